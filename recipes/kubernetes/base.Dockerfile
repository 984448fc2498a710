# docker build -t collm-base -f recipes/kubernetes/base.Dockerfile .
#
# vLLM and the plug-in by which a base defers.
FROM vllm/vllm-openai:v0.32.0

COPY . /src
RUN python3 -m pip install --no-cache-dir /src/plugins/vllm && rm -rf /src
