"""Holds the shape of llmbench.py: its sections, what each may use and name, how long and how well described things are.

Each rule is a function that takes a Source and gives the violations as lines of text. The rules are themselves tested:
a small sound module passes all of them, and each violation that is planted in it is found.
"""

from __future__ import annotations

import ast
import builtins
import re
import symtable
import sys
from typing import Iterator, NamedTuple

import pytest

from conftest import ROOT

if sys.version_info < (3, 8):
    pytest.skip("ast tells where a node ends since Python 3.8", allow_module_level=True)

# Which sections may name a module, a builtin or an attribute. What is not listed is free.
FENCES: dict[str, set[str]] = {
    "asyncio": {"Connection", "Runner", "Processes", "Mock", "Probes", "Check", "Commands"},
    "ssl": {"Connection", "Probes", "Check"},
    "socket": {"Connection", "Artifacts", "Mock", "Probes", "Check"},  # Artifacts: which host and address this is
    "selectors": {"Connection", "Mock"},
    "multiprocessing": {"Processes", "Mock", "Commands"},
    "signal": {"Processes", "Mock", "Commands"},
    "subprocess": {"Runner", "Mock", "Probes", "Check", "Commands"},  # Runner: the command that prints a token
    "argparse": {"Mock", "Commands"},
    "random": {"Workload", "Statistics", "Load", "Report", "Mock"},  # always seeded
    "time": {"Connection", "Runner", "Processes", "Artifacts", "Terminal", "Mock", "Probes", "Check", "Commands"},
    "print": {"Terminal", "Mock", "Probes", "Check", "Commands"},
    "input": set(),
    "sys.stdout": {"Terminal", "Mock", "Probes", "Check", "Commands"},
    "sys.stderr": {"Terminal", "Mock", "Probes", "Check", "Commands"},
    "sys.exit": {"Commands"},
    "typing.get_type_hints": set(),  # annotations are written in a newer form than Python 3.7 can evaluate
}
LONGEST_FUNCTION = 60  # lines
SHORTEST_ESSAY = 5  # lines

BANNER = re.compile(r"^# ={20,}\n# (\d+)\. ([A-Z]\w*): (\S.*)\n# ={20,}\n", re.MULTILINE)
HEADING = re.compile(r"^# \d+\. ", re.MULTILINE)
HOW_IT_WAS_MADE = re.compile(r"\b(issue #?\d+|session \d|agent session)\b", re.IGNORECASE)

Function = (ast.FunctionDef, ast.AsyncFunctionDef)


class Section(NamedTuple):
    """One section: its number, its one-word title, and the lines from its heading to the next banner."""

    number: int
    title: str
    first: int
    last: int


class Use(NamedTuple):
    """A module-level or builtin name, where it is used, and whether only when the code there is called."""

    name: str
    line: int
    scope: str
    deferred: bool


class Source:
    """A module's text with everything that the rules ask about it. Line 1 is the first."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.lines = text.splitlines()
        self.tree = ast.parse(text)
        self.sections = find_sections(text)
        self.definitions = find_definitions(self.tree)
        self.imports = find_imports(self.tree)

    def section_at(self, line: int) -> Section:
        """The section that holds a line; what stands above the first one is number 0."""
        return next((s for s in self.sections if s.first <= line <= s.last), Section(0, "the head of the file", 1, 0))

    def functions(self) -> Iterator[ast.FunctionDef]:
        """Every def of the module, nested ones and methods included."""
        return (node for node in ast.walk(self.tree) if isinstance(node, Function))


def find_sections(text: str) -> list[Section]:
    """The sections, in the order of the file."""
    heads = [(match, text.count("\n", 0, match.start()) + 1) for match in BANNER.finditer(text)]
    ends = [line - 1 for _, line in heads[1:]] + [text.count("\n") + 1]
    return [Section(int(match[1]), match[2], line, end) for (match, line), end in zip(heads, ends)]


def find_definitions(tree: ast.Module) -> dict[str, int]:
    """The module's own names and the line of their first binding, branches of the top level included."""
    found: dict[str, int] = {}
    waiting: list[ast.AST] = list(tree.body)
    for node in waiting:
        if isinstance(node, (*Function, ast.ClassDef)):
            found.setdefault(node.name, node.lineno)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias in node.names:
                found.setdefault((alias.asname or alias.name).split(".")[0], node.lineno)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.setdefault(node.id, node.lineno)
        else:
            waiting.extend(ast.iter_child_nodes(node))
    return found


def find_imports(tree: ast.Module) -> dict[str, str]:
    """What an imported name stands for, wherever it is imported: {"sleep": "asyncio.sleep", "clock": "time"}."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                package = alias.name.split(".")[0]
                found[alias.asname or package] = alias.name if alias.asname else package
        elif isinstance(node, ast.ImportFrom):
            found.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})
    return found


def annotations(tree: ast.Module) -> list[ast.expr]:
    """Every annotation: with `from __future__ import annotations` they are text, and use nothing."""
    found = [node.annotation for node in ast.walk(tree) if isinstance(node, (ast.arg, ast.AnnAssign))]
    found += [node.returns for node in ast.walk(tree) if isinstance(node, Function)]
    return [annotation for annotation in found if annotation is not None]


def without_annotations(text: str) -> str:
    """The text with every annotation replaced by a constant, each line where it was."""
    lines = [bytearray(line, "utf-8") for line in text.splitlines()]
    for node in annotations(ast.parse(text)):
        for index in range(node.lineno - 1, node.end_lineno):
            start = node.col_offset if index == node.lineno - 1 else 0
            end = node.end_col_offset if index == node.end_lineno - 1 else len(lines[index])
            lines[index][start:end] = b" " * (end - start)
        lines[node.lineno - 1][node.col_offset : node.col_offset + 1] = b"0" if node.lineno == node.end_lineno else b"("
        if node.lineno != node.end_lineno:
            lines[node.end_lineno - 1][node.end_col_offset - 1 : node.end_col_offset] = b"0)"
    return "\n".join(line.decode("utf-8") for line in lines) + "\n"


def find_uses(source: Source) -> list[Use]:
    """Every use of a module-level or builtin name, annotations apart, nearest line that can be told."""
    text = without_annotations(source.text)
    tree = ast.parse(text)
    return [*uses_when_called(symtable.symtable(text, "llmbench.py", "exec")), *uses_when_imported(tree)]


def uses_when_called(table: symtable.SymbolTable) -> Iterator[Use]:
    """What the bodies of functions and classes use; their line is that of the scope."""
    for scope in table.get_children():
        for symbol in scope.get_symbols():
            if symbol.is_global() and symbol.is_referenced():
                yield Use(symbol.get_name(), scope.get_lineno(), scope.get_name(), True)
        yield from uses_when_called(scope)


def uses_when_imported(tree: ast.Module) -> Iterator[Use]:
    """What the statements of the top level use themselves: values, decorators, bases, defaults."""
    waiting: list[ast.AST] = list(tree.body)
    for node in waiting:
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            yield Use(node.id, node.lineno, "the top level", False)
        children = ast.iter_child_nodes(node)
        if isinstance(node, (*Function, ast.ClassDef, ast.Lambda)):
            inside = node.body if isinstance(node.body, list) else [node.body]
            children = (child for child in children if child not in inside)
        waiting.extend(children)


# The rules


def sections_are_numbered(source: Source) -> list[str]:
    """Banners are of one form and count from 1."""
    headings = len(HEADING.findall(source.text))
    numbers = [section.number for section in source.sections]
    problems = [] if headings == len(numbers) else [f"{headings} headings, but {len(numbers)} whole banners"]
    if not numbers:
        return ["no section"]
    return problems + ([] if numbers == list(range(1, len(numbers) + 1)) else [f"sections are numbered {numbers}"])


def map_lists_the_sections(source: Source) -> list[str]:
    """The module's docstring names every section, in order, each at the head of a line."""
    titles = [section.title for section in source.sections]
    heads = re.findall(r"^\s*(?:\d+\.?\s+)?([A-Z]\w*)\b", ast.get_docstring(source.tree) or "", re.MULTILINE)
    listed = [head for head in heads if head in titles]
    return [] if listed == titles else [f"the docstring's map lists {listed}, the file holds {titles}"]


def essays_open_sections(source: Source) -> list[str]:
    """A comment of some lines follows each banner: the strategy, the contract, what it refuses and why."""
    problems = []
    for section in source.sections:
        essay = 0
        for line in source.lines[section.first + 2 : section.last]:
            if line and not line.startswith("#"):
                break
            essay += len(line) > 2
        if essay < SHORTEST_ESSAY:
            problems.append(f"{section.title} opens with {essay} lines of comment, not {SHORTEST_ESSAY}")
    return problems


def data_flows_down(source: Source) -> list[str]:
    """A section uses only what is defined in it or above it."""
    problems = []
    for use in find_uses(source):
        here = source.section_at(use.line)
        there = source.section_at(source.definitions.get(use.name, 1))
        if there.number > here.number:
            problems.append(f"{here.title}: {use.scope}, line {use.line}, uses {use.name} of {there.title}")
    return problems


def fences_hold(source: Source) -> list[str]:
    """The modules, builtins and attributes of FENCES are named in the sections that may name them, and in no other."""
    uses = [(source.imports.get(use.name, use.name), use.line) for use in find_uses(source)]
    uses = [(name, line) for name, line in uses if name not in source.definitions or name in source.imports]
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            uses.append((f"{source.imports.get(node.value.id, node.value.id)}.{node.attr}", node.lineno))
        elif isinstance(node, ast.Import):
            uses += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            uses += [(f"{node.module}.{alias.name}", node.lineno) for alias in node.names]
    return sorted({problem for name, line in uses for problem in fence_problems(source.section_at(line), name)})


def fence_problems(section: Section, name: str) -> list[str]:
    """What one name breaks in one section; the imports at the head of the file are everybody's."""
    if section.number == 0:
        return []
    fenced = [fence for fence in FENCES if name == fence or name.startswith(fence + ".")]
    return [f"{section.title} names {fence}" for fence in fenced if section.title not in FENCES[fence]]


def functions_are_short(source: Source) -> list[str]:
    """No function is longer than what one screen shows."""
    lengths = {f"{node.name}:{node.lineno}": node.end_lineno - node.lineno + 1 for node in source.functions()}
    return [f"{name} has {length} lines" for name, length in lengths.items() if length > LONGEST_FUNCTION]


def signatures_are_annotated(source: Source) -> list[str]:
    """Every def says the types of its parameters and of what it returns."""
    problems = []
    for node in source.functions():
        parameters = [*node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
        bare = [p.arg for p in parameters if p and not p.annotation and p.arg not in ("self", "cls")]
        bare += [] if node.returns else ["return"]
        problems += [f"{node.name}, line {node.lineno}: no type for {', '.join(bare)}"] if bare else []
    return problems


def public_things_are_described(source: Source) -> list[str]:
    """Public functions and classes have docstrings, and methods that do not just do what a class above said."""
    classes = {node.name: node for node in source.tree.body if isinstance(node, ast.ClassDef)}
    subjects = [node for node in source.tree.body if isinstance(node, (*Function, ast.ClassDef))]
    for owner in classes.values():
        said = inherited_methods(owner, classes)
        subjects += [node for node in owner.body if isinstance(node, Function) and node.name not in said]
    undescribed = [node for node in subjects if not node.name.startswith("_") and not ast.get_docstring(node)]
    return [f"{node.name}, line {node.lineno}: no docstring" for node in undescribed]


def inherited_methods(owner: ast.ClassDef, classes: dict[str, ast.ClassDef]) -> set[str]:
    """The names of the methods that the module's own base classes of a class define."""
    bases = [classes[base.id] for base in owner.bases if isinstance(base, ast.Name) and base.id in classes]
    own = {node.name for base in bases for node in base.body if isinstance(node, Function)}
    return own.union(*(inherited_methods(base, classes) for base in bases))


def names_are_bound_once(source: Source) -> list[str]:
    """No function, class or constant of the module takes the name of another: the later one would serve both."""
    bound: list[str] = []
    for node in source.tree.body:
        if isinstance(node, (*Function, ast.ClassDef)):
            bound.append(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            bound += [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)
                      and isinstance(name.ctx, ast.Store)]  # fmt: skip
    return [f"{name} is bound {bound.count(name)} times" for name in dict.fromkeys(bound) if bound.count(name) > 1]


RULES = [
    names_are_bound_once,
    sections_are_numbered,
    map_lists_the_sections,
    essays_open_sections,
    data_flows_down,
    fences_hold,
    functions_are_short,
    signatures_are_annotated,
    public_things_are_described,
]


@pytest.fixture(scope="module")
def program() -> Source:
    """llmbench.py itself."""
    return Source((ROOT / "llmbench.py").read_text(encoding="utf-8"))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_llmbench_keeps_the_rule(rule: object, program: Source) -> None:
    assert rule(program) == []


def test_every_fence_names_sections_that_exist(program: Source) -> None:
    titles = {section.title for section in program.sections}
    assert {title for allowed in FENCES.values() for title in allowed} <= titles


@pytest.mark.parametrize("name", ["llmbench.py", "README.md", "README.zh.md", "CHANGELOG.md"])
def test_the_text_is_about_the_program_not_about_its_making(name: str) -> None:
    path = ROOT / name
    if not path.exists():
        pytest.skip(f"{name} is not there")
    assert HOW_IT_WAS_MADE.findall(path.read_text(encoding="utf-8")) == []


# The rules, tested on a module that keeps them all and on one violation each

RULE_LINE = "# " + "=" * 60
ESSAY = "\n".join("# what it does and why" for _ in range(SHORTEST_ESSAY))
SOUND = f'''"""A sound module.

1. Vocabulary  words
2. Connection  sockets
3. Commands    main
"""

from __future__ import annotations

import asyncio
import sys
import time as clock
from typing import Optional

{RULE_LINE}
# 1. Vocabulary: plain data
{RULE_LINE}
#
{ESSAY}


class Prompt:
    """A prompt."""

    size: Optional[Connection] = None

    def text(self) -> str:
        """Its text."""
        return str(self.size)


{RULE_LINE}
# 2. Connection: the only I/O
{RULE_LINE}
{ESSAY}


class Connection(Prompt):
    """A connection."""

    def text(self) -> str:
        return "inherited, so described above"

    async def open(self, print: str, *, main: int = 3) -> Optional[
        Commands
    ]:
        """Local names that shadow are no use of the ones outside."""
        await asyncio.sleep(clock.time() + main)
        return print


{RULE_LINE}
# 3. Commands: main
{RULE_LINE}
{ESSAY}


def main() -> int:
    """Runs."""
    print(Connection(), later())
    return 0


def later() -> int:
    """Below main, but in its section."""
    return len(sys.argv)
'''
VOCABULARY = "        return str(self.size)\n"
UPWARD = VOCABULARY + "\n    def up(self) -> object:\n"
DOWN_MAP = "2. Connection  sockets\n3. Commands    main"

PLANTED = [
    (names_are_bound_once, "def later() -> int:", "main = 1\n\n\ndef later() -> int:", "main is bound 2 times"),
    (names_are_bound_once, "def later() -> int:", "Prompt: int = 1\n\n\ndef later() -> int:", "Prompt is bound"),
    (data_flows_down, VOCABULARY, UPWARD + "        return Connection()\n", "Connection"),
    (data_flows_down, VOCABULARY, UPWARD + "        return [main for _ in ()]\n", "main"),
    (data_flows_down, VOCABULARY, VOCABULARY + "\n    up = lambda self: main()\n", "main"),
    (data_flows_down, "class Connection(Prompt)", "class Connection(Prompt, metaclass=later)", "later"),
    (data_flows_down, "main: int = 3", "main: int = later()", "later"),
    (fences_hold, VOCABULARY, "        return str(asyncio)\n", "Vocabulary names asyncio"),
    (fences_hold, VOCABULARY, "        return str(clock.time())\n", "Vocabulary names time"),
    (fences_hold, VOCABULARY, "        import random\n        return str(random)\n", "Vocabulary names random"),
    (fences_hold, VOCABULARY, "        from ssl import SSLError as e\n        return str(e)\n", "Vocabulary names ssl"),
    (fences_hold, "import sys\n", "import sys\nfrom asyncio import sleep as nap\n\nNAP = 1\n", ""),
    (fences_hold, VOCABULARY, "        return print(self)\n", "Vocabulary names print"),
    (fences_hold, VOCABULARY, "        sys.stdout.write('x')\n", "Vocabulary names sys.stdout"),
    (fences_hold, "class Connection(Prompt):", "X = print(1)\n\n\nclass Connection(Prompt):", "Connection names print"),
    (sections_are_numbered, "# 2. Connection", "# 4. Connection", "numbered [1, 4, 3]"),
    (sections_are_numbered, f"# 3. Commands: main\n{RULE_LINE}", "# 3. Commands: main", "3 headings, but 2"),
    (map_lists_the_sections, DOWN_MAP, "2. Commands main\n3. Connection", "map lists"),
    (map_lists_the_sections, "3. Commands    main\n", "", "map lists"),
    (essays_open_sections, f"#\n{ESSAY}", f"#\n{ESSAY[:-30]}", "Vocabulary opens with 4"),
    (functions_are_short, "    return 0\n", "    pass\n" * LONGEST_FUNCTION + "    return 0\n", "main:"),
    (signatures_are_annotated, "def later() -> int:", "def later(*rest, key=1) -> int:", "no type for key, rest"),
    (signatures_are_annotated, "def later() -> int:", "def later():", "no type for return"),
    (public_things_are_described, '    """Runs."""\n', "", "main, line"),
    (public_things_are_described, '    """A prompt."""\n', "", "Prompt, line"),
    (public_things_are_described, '        """Its text."""\n', "", "text, line"),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_sound_module_keeps_the_rule(rule: object) -> None:
    assert rule(Source(SOUND)) == []


@pytest.mark.parametrize(("rule", "sound", "planted", "finding"), PLANTED)
def test_a_planted_violation_is_found(rule: object, sound: str, planted: str, finding: str) -> None:
    assert SOUND.count(sound) >= 1, "the planted text would change nothing"
    problems = rule(Source(SOUND.replace(sound, planted, 1)))
    assert problems if finding else not problems
    assert any(finding in problem for problem in problems) or not finding


def test_every_rule_has_a_planted_violation() -> None:
    assert {rule for rule, *_ in PLANTED} == set(RULES)


def test_fences_are_names_that_mean_something() -> None:
    unknown = [name for name in FENCES if "." not in name and not hasattr(builtins, name) and not is_module(name)]
    assert unknown == []


def is_module(name: str) -> bool:
    """Whether the standard library has a module of that name."""
    try:
        __import__(name)
    except ImportError:
        return False
    return True


@pytest.mark.parametrize(
    ("text", "found"),
    [("see issue 12", True), ("Issue #3", True), ("session 4", True), ("agent session", True), ("TLS session", False)],
)
def test_the_search_for_how_it_was_made(text: str, found: bool) -> None:
    assert bool(HOW_IT_WAS_MADE.search(text)) is found
