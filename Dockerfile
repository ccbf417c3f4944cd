# CPU image by default. On an Ascend server build with
#   --build-arg BASE=ascendai/cann:9.1.0-910b-ubuntu22.04-py3.12 --build-arg EXTRA=npu
# and start with --device /dev/davinci0 --device /dev/davinci_manager --device /dev/devmm_svm --device /dev/hisi_hdc
# and the driver's mounts. The NPU image has never run on a card.
ARG BASE=python:3.12-slim
FROM ${BASE}
ARG EXTRA=
WORKDIR /opt/tuneserve
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY lm lm
COPY trainer trainer
COPY service service
COPY configs configs
COPY examples examples
# torch_npu cannot live beside a CUDA build of torch: on x86 pass --build-arg PIP_EXTRA_INDEX_URL=<PyTorch's CPU index>.
ARG PIP_EXTRA_INDEX_URL=
RUN pip install --no-cache-dir -c constraints.txt ".${EXTRA:+[$EXTRA]}"
ENV TUNESERVE_HOME=/data TORCH_DEVICE_BACKEND_AUTOLOAD=0 PYTHONUNBUFFERED=1
VOLUME /data
EXPOSE 8000
# CANN's set_env.sh must be sourced before Python starts.
ENTRYPOINT ["/bin/bash", "-c", "for f in /usr/local/Ascend/cann/set_env.sh /usr/local/Ascend/ascend-toolkit/set_env.sh /usr/local/Ascend/nnal/atb/set_env.sh; do [ -f $f ] && . $f; done; exec tuneserve \"$@\"", "tuneserve"]
CMD ["serve", "host=0.0.0.0"]
