"""assets/kubernetes.yaml: that it is YAML, and that the Job it describes can do what its comments promise.

No YAML parser is among the development packages: `parse` below reads the subset that the file is written in, and
nothing else. Where PyYAML happens to be installed it has to agree.
"""

from __future__ import annotations

import datetime
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
from typing import Any, Iterator

import pytest

import llmbench
from conftest import ROOT

PATH = ROOT / "assets" / "kubernetes.yaml"
NEW_FLAGS = ("shard", "start-at")
USER = 65532  # distroless' nonroot

# --- a strict parser of block maps, block lists and scalars -----------------------------------------------------------

KEY = re.compile(r"^([A-Za-z][A-Za-z0-9./-]*):(?: +(.*))?$")
NUMBER = re.compile(r"^(0|[1-9][0-9]*)$")
PLAIN = re.compile(r"^[A-Za-z0-9/-][A-Za-z0-9 _./()$;:=+-]*$")
NOT_PLAIN = re.compile(r"(?i)^(~|null|yes|no|on|off|y|n|true|false|[0-9.+-]+)$|: |:$| #|^- ")


class Line:
    """A line that holds something: its number, its indentation and its text without comment."""

    def __init__(self, number: int, indent: int, text: str) -> None:
        self.number, self.indent, self.text = number, indent, text

    def refuse(self, why: str) -> ValueError:
        return ValueError("line %d: %s: %s" % (self.number, why, self.text))


def without_comment(raw: str) -> str:
    """A line up to a # that begins it or follows a blank, outside of quotes."""
    quoted = False
    for place, letter in enumerate(raw):
        quoted ^= letter == '"'
        if letter == "#" and not quoted and raw[:place][-1:] in ("", " "):
            return raw[:place]
    return raw


def lines_of(text: str) -> Iterator[Line]:
    for number, raw in enumerate(text.split("\n"), 1):
        body = without_comment(raw)
        line = Line(number, len(body) - len(body.lstrip(" ")), body.strip(" "))
        if "\t" in raw or raw != raw.rstrip():
            raise line.refuse("a tab, or blanks at the end")
        if line.text and line.indent % 2:
            raise line.refuse("odd indentation")
        if line.text:
            yield line


def parse(text: str) -> list[Any]:
    """The documents of a file; raises ValueError at what is not in the subset."""
    documents: list[list[Line]] = [[]]
    for line in lines_of(text):
        if line.text == "---":
            documents.append([])
        else:
            documents[-1].append(line)
    made = []
    for lines in documents:
        if not lines:
            raise ValueError("an empty document")
        value = block(lines, 0)
        if lines:
            raise lines[0].refuse("indented where nothing can be")
        made.append(value)
    return made


def block(lines: list[Line], indent: int) -> Any:
    """The map or list that begins with the first line; takes its lines away."""
    if lines[0].indent != indent:
        raise lines[0].refuse("indented by %d, not %d" % (lines[0].indent, indent))
    if lines[0].text.startswith("- "):
        items = []
        while lines and lines[0].indent == indent and lines[0].text.startswith("- "):
            first = lines[0]
            rest = Line(first.number, indent + 2, first.text[2:].lstrip(" "))
            if KEY.match(rest.text):
                lines[0] = rest
                items.append(block(lines, indent + 2))
            else:
                del lines[0]
                items.append(scalar(rest))
        return items
    found: dict[str, Any] = {}
    while lines and lines[0].indent == indent:
        line = lines.pop(0)
        match = KEY.match(line.text)
        if match is None:
            raise line.refuse("neither key nor item")
        if match.group(1) in found:
            raise line.refuse("a key for the second time")
        if match.group(2) is not None:
            found[match.group(1)] = scalar(Line(line.number, indent, match.group(2)))
        elif lines and lines[0].indent > indent:
            found[match.group(1)] = block(lines, indent + 2)
        else:
            raise line.refuse("a key without a value")
    return found


def scalar(line: Line) -> Any:
    if line.text.startswith('"'):
        return json.loads(line.text)
    if NUMBER.match(line.text):
        return int(line.text)
    if line.text in ("true", "false"):
        return line.text == "true"
    if not PLAIN.match(line.text) or NOT_PLAIN.search(line.text):
        raise line.refuse("a text that wants quotes")
    return line.text


@pytest.mark.parametrize("text,value", [
    ("a: 1", {"a": 1}), ("a: x # why", {"a": "x"}), ('a: "1"  # why', {"a": "1"}),
    ("a:\n  b: true", {"a": {"b": True}}),
    ("- x\n- --y", ["x", "--y"]), ("a:\n  - b: 1\n    c: 2\n  - b: 3", {"a": [{"b": 1, "c": 2}, {"b": 3}]}),
    ("# head\n#\na:\n\n  b:\n    - auto/4\nc: d", {"a": {"b": ["auto/4"]}, "c": "d"}),
    ("a: https://h:1/x", {"a": "https://h:1/x"}), ('a: "# no comment"', {"a": "# no comment"}),
])  # fmt: skip
def test_the_parser_reads_its_subset(text, value):
    assert parse(text) == [value]


@pytest.mark.parametrize("text", [
    "a:\n\tb: 1", "a: 1 ", "a:\n   b: 1", "a:\n    b: 1", "a: 1\na: 2", "a:", "a:\nb: 1", "a: {}", "a: [1]", "a: &x 1",
    "a: *x", "a: |", "a: >-", "a: yes", "a: null", "a: 1.5", "a: -1", "a: 010", "a: 'x'", 'a: "x', "a: b: c", "b", "",
    "a: 1\n---\n", "a: 1\n  b: 2", "- a\n  - b", "- a\nb: 1", "? a", "a : 1", "a: !x y", "a:1", "a: @x", "a: %x",
    "a: x:", "a: x# y", "a: 1\n # b\n c: 2",
])  # fmt: skip
def test_the_parser_refuses_everything_else(text):
    with pytest.raises(ValueError):
        parse(text)


# --- the file ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def documents() -> dict[str, Any]:
    """The documents of the file by kind."""
    found = parse(PATH.read_text(encoding="utf-8"))
    assert [document["kind"] for document in found] == ["PersistentVolumeClaim", "Job", "Pod"]
    return {document["kind"]: document for document in found}


def container(documents: dict[str, Any]) -> dict[str, Any]:
    (only,) = documents["Job"]["spec"]["template"]["spec"]["containers"]
    return only


def flags_of(documents: dict[str, Any]) -> dict[str, str]:
    """The arguments after `run`, flag -> value."""
    args = container(documents)["args"]
    assert args[0] == "run" and all(isinstance(word, str) for word in args), "numbers want quotes"
    names, values = args[1::2], args[2::2]
    assert len(names) == len(values) and all(name.startswith("--") for name in names)
    return {name[2:]: value for name, value in zip(names, values)}


READ_YAML = """
import json, sys, yaml
json.dump(list(yaml.safe_load_all(open(sys.argv[1], encoding="utf-8"))), sys.stdout)
"""


def test_other_parsers_read_the_same() -> None:
    """PyYAML of this Python, or of the python3 on the PATH."""
    for python in filter(None, (sys.executable, shutil.which("python3"))):
        done = subprocess.run([python, "-c", READ_YAML, str(PATH)], capture_output=True)
        if done.returncode == 0:
            assert json.loads(done.stdout) == parse(PATH.read_text(encoding="utf-8"))
            return
    pytest.skip("no PyYAML on this machine")


def test_it_is_an_indexed_job_whose_pods_all_run_at_once(documents) -> None:
    job = documents["Job"]
    assert (job["apiVersion"], job["spec"]["completionMode"]) == ("batch/v1", "Indexed")
    n = job["spec"]["completions"]
    assert n == job["spec"]["parallelism"] >= 2
    assert flags_of(documents)["shard"] == "auto/%d" % n


def test_a_shard_is_never_run_again_and_ends_no_other(documents) -> None:
    """Its moment is over; and a gate that failed on one host must not stop the measurement of the others."""
    spec = documents["Job"]["spec"]
    assert spec["backoffLimitPerIndex"] == 0 and "backoffLimit" not in spec
    assert spec["template"]["spec"]["restartPolicy"] == "Never"


def test_run_takes_the_arguments(documents, monkeypatch) -> None:
    """As the container gives them, with the start put in by sed and the index by Kubernetes."""
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "2")
    monkeypatch.setenv("LLMBENCH_TOKEN", "secret")
    start = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(minutes=3)
    flags = flags_of(documents)
    assert flags["start-at"] == "START_AT"
    words = []
    for name, value in flags.items():
        if name in llmbench.FLAGS or name not in NEW_FLAGS:
            filled = value.replace("START_AT", start.strftime("%Y-%m-%dT%H:%M:%SZ"))
            words += ["--" + name, filled.replace("$(JOB_COMPLETION_INDEX)", "2")]
    config = llmbench.read_config(words)
    assert (config.token, config.out) == ("secret", "/results/shard-2")
    n = documents["Job"]["spec"]["completions"]
    assert config.concurrency[0] >= n * config.processes, "each process of each pod has a stream"
    assert config.total_requests >= config.concurrency[0] and config.model and config.url.startswith("https://")


def test_only_the_index_is_left_to_kubernetes_to_fill_in(documents) -> None:
    named = re.findall(r"\$\((\w+)\)", " ".join(container(documents)["args"]))
    assert named == ["JOB_COMPLETION_INDEX"]


def test_the_start_stands_in_one_place_for_sed() -> None:
    lines = [line for line in PATH.read_text(encoding="utf-8").splitlines() if "START_AT" in line]
    assert [line.strip() for line in lines if not line.startswith("#")] == ["- START_AT"]
    assert any("sed" in line for line in lines)


def mounts(pod: dict[str, Any]) -> dict[str, str]:
    """Where the volumes of a pod with one container are, path -> name; each is declared and each is used."""
    found = {mount["mountPath"]: mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    assert sorted(found.values()) == sorted(volume["name"] for volume in pod["volumes"])
    return found


def test_results_go_to_a_volume_that_outlives_the_pods(documents) -> None:
    claim, pod = documents["PersistentVolumeClaim"], documents["Job"]["spec"]["template"]["spec"]
    assert (claim["apiVersion"], claim["spec"]["accessModes"]) == ("v1", ["ReadWriteMany"])
    out = flags_of(documents)["out"]
    assert out.startswith("/results/") and out.endswith("$(JOB_COMPLETION_INDEX)"), "a directory for each index"
    for spec in (pod, documents["Pod"]["spec"]):
        name = mounts(spec)["/results"]
        (volume,) = [volume for volume in spec["volumes"] if volume["name"] == name]
        assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert "WORKDIR /results" in (ROOT / "Dockerfile").read_text(encoding="utf-8")


def test_it_runs_where_the_root_file_system_is_read_only(documents) -> None:
    """Bytecode goes to /tmp by the image's environment: that has to be a volume of its own."""
    pod = documents["Job"]["spec"]["template"]["spec"]
    (tmp,) = [volume for volume in pod["volumes"] if volume["name"] == mounts(pod)["/tmp"]]
    assert "emptyDir" in tmp
    assert "PYTHONPYCACHEPREFIX=/tmp/" in (ROOT / "Dockerfile").read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", ["Job", "Pod"])
def test_the_pods_are_as_little_as_they_can_be(documents, kind) -> None:
    spec = documents["Pod"]["spec"] if kind == "Pod" else documents["Job"]["spec"]["template"]["spec"]
    shared, own = spec["securityContext"], spec["containers"][0]["securityContext"]
    assert shared["runAsNonRoot"] is True and shared["seccompProfile"] == {"type": "RuntimeDefault"}
    assert {shared[name] for name in ("runAsUser", "runAsGroup", "fsGroup")} == {USER}
    assert "USER %d:%d" % (USER, USER) in (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert own == {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
    assert spec["automountServiceAccountToken"] is False


def test_it_needs_no_shell(documents) -> None:
    """The image has none: its entry point takes the arguments, and the other pod starts Python itself."""
    assert "command" not in container(documents)
    (files,) = documents["Pod"]["spec"]["containers"]
    assert files["image"] == container(documents)["image"] and files["command"][0] == "/usr/bin/python3"
    compile(files["command"][2], "command", "exec")
    assert "/usr/bin/python3" in (ROOT / "Dockerfile").read_text(encoding="utf-8")


def test_resources_are_those_of_the_processes(documents) -> None:
    """A CPU limit would throttle the client in the middle of a read; memory is bounded."""
    resources = container(documents)["resources"]
    assert resources["requests"]["cpu"] == flags_of(documents)["processes"]
    assert resources["limits"] == {"memory": resources["requests"]["memory"]}


def test_the_token_comes_from_a_secret(documents) -> None:
    (variable,) = container(documents)["env"]
    assert variable["name"] == "LLMBENCH_TOKEN" and "token" not in flags_of(documents)
    secret = variable["valueFrom"]["secretKeyRef"]
    assert "create secret generic %(name)s --from-file=%(key)s=" % secret in PATH.read_text(encoding="utf-8")


def test_pods_are_spread_by_a_label_that_they_have(documents) -> None:
    template = documents["Job"]["spec"]["template"]
    (spread,) = template["spec"]["topologySpreadConstraints"]
    assert spread["labelSelector"]["matchLabels"] == template["metadata"]["labels"]
    assert spread["whenUnsatisfiable"] == "ScheduleAnyway", "a pod that waits for a node would miss the start"


def commands() -> str:
    """The commands in the comments, as a reader copies them: one line each."""
    lines = re.findall(r"^#   (.*)$", PATH.read_text(encoding="utf-8"), re.MULTILINE)
    return "\n".join(lines).replace("\\\n", " ")


def test_the_comments_name_what_is_in_the_file(documents) -> None:
    text = commands()
    for kind, short in (("Job", "job/"), ("Pod", "pod/"), ("PersistentVolumeClaim", "pvc/")):
        assert short + documents[kind]["metadata"]["name"] in text
    assert "kubectl exec %s " % documents["Pod"]["metadata"]["name"] in text
    assert "merge results/shard-* --out" in text and "merge" in llmbench.COMMANDS


def test_the_command_that_collects_makes_an_archive(tmp_path) -> None:
    """Python's part of it, with a directory of this machine in place of the volume's."""
    source = re.search(r'-c "([^"]+)"', commands()).group(1)
    (tmp_path / "volume" / "shard-0").mkdir(parents=True)
    (tmp_path / "volume" / "shard-0" / "results.jsonl").write_text("{}\n")
    python = shutil.which("python3") or pytest.skip("no python3")
    script = source.replace("'/results'", repr(str(tmp_path / "volume")))
    done = subprocess.run([python, "-c", script], capture_output=True, check=True)
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        assert "results/shard-0/results.jsonl" in archive.getnames()
