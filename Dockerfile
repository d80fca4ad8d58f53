# llmbench in a minimal image: Python, the CA certificates and one file; no shell, no package manager, not root.
#
#   python3 build.py && docker build -t llmbench .
#
# There is no RUN step, so an image for the other architecture builds without emulation:
#
#   docker buildx build --platform linux/amd64,linux/arm64 -t llmbench .
#
# Another base (a mirror, a digest): --build-arg BASE=…; it needs /usr/bin/python3, Python 3.7 or newer.
ARG BASE=gcr.io/distroless/python3-debian13:nonroot
FROM ${BASE}
COPY --chmod=0644 dist/llmbench.pyz /opt/llmbench/llmbench.pyz
# The base ships the standard library without bytecode: a cache in /tmp makes worker processes start three times as fast.
ENV PYTHONUNBUFFERED=1 PYTHONPYCACHEPREFIX=/tmp/pycache
USER 65532:65532
# Results are written here: mount a directory that the user may write to.
WORKDIR /results
ENTRYPOINT ["/usr/bin/python3", "/opt/llmbench/llmbench.pyz"]
CMD ["--help"]
