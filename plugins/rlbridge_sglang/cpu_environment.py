"""The environment in which SGLang runs on a CPU: what is installed, and what stands in for the kernels that are not."""

from __future__ import annotations

from rlbridge import Environment

_SGLANG = (
    "torch==2.13.0+cpu",
    "transformers==5.19.0",
    "tokenizers==0.23.2",
    "aiohttp",
    "compressed-tensors==0.18.0",
    "dill",
    "einops",
    "fastapi",
    "gguf",
    "ipython",
    "mistral-common>=1.11.5",
    "nvidia-ml-py",
    "openai==2.8.0",
    "orjson",
    "packaging",
    "partial-json-parser",
    "pillow",
    "psutil",
    "pybase64",
    "python-multipart",
    "pyzmq>=25.1.2",
    "regex",
    "requests",
    "scipy",
    "sentencepiece==0.2.1",
    "setproctitle",
    "soundfile==0.13.1",
    "tiktoken",
    "tqdm",
    "uvicorn>=0.51",
    "uvloop",
    "watchfiles",
    "xgrammar==0.2.7",
    "zstandard",
)
"""What SGLang's engine imports on a CPU, of all that it asks for: no kernels, no codecs, no other servers."""

SGLANG_CPU = Environment(
    name="sglang-cpu",
    summary="SGLang 0.5.23 on a CPU, in pure PyTorch: small models, to try and to test with.",
    lock="rlbridge_sglang:sglang-cpu.lock",
    requirements=("rlbridge[conform,native,nixl]", *_SGLANG),
    no_deps=("sglang==0.5.23", "torchvision==0.28.0"),
    variables={
        "SGLANG_USE_CPU_ENGINE": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    },
    site="rlbridge_sglang:cpu_site",
    modules=("sglang.srt.entrypoints.engine", "sgl_kernel", "nixl", "ray", "rlbridge_conformance"),
)
