"""What SGLang leaves out of the contract, put into the rank's process: seeds, and scores at a temperature."""

from __future__ import annotations

from typing import Any

_UNSEEDED = 0


def keep_seeds() -> None:
    """Let a request's seed fix what is sampled for it, whatever runs beside it.

    SGLang samples from seeds in its deterministic mode alone, which also takes slower kernels and refuses most attention
    backends. Its sampler needs no more than the seeds: the noise of a token follows from the seed and the token's position.
    """
    import torch
    from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

    make = SamplingBatchInfo.from_schedule_batch.__func__

    def from_schedule_batch(cls: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        info = make(cls, batch, *args, **kwargs)
        if info.sampling_seed is None:
            seeds = [request.sampling_params.sampling_seed for request in batch.reqs]
            info.sampling_seed = torch.tensor(
                [_UNSEEDED if seed is None else seed for seed in seeds], dtype=torch.int64, device=info.temperatures.device
            )
        return info

    SamplingBatchInfo.from_schedule_batch = classmethod(from_schedule_batch)


def score_at_temperature() -> None:
    """Let the log-probs of a prompt be those at the request's temperature; SGLang's own are at temperature 1.

    Only rows whose log-probs are asked for are divided: what the sampler gets stays as it is.
    """
    from sglang.srt.layers.logits_processor import LogitsMetadata
    from sglang.srt.layers.logprob_processor import InputLogprobProcessor

    describe = LogitsMetadata.from_forward_batch.__func__
    compute = InputLogprobProcessor.forward

    def from_forward_batch(cls: Any, forward_batch: Any) -> Any:
        metadata = describe(cls, forward_batch)
        metadata.rlbridge_temperatures = getattr(forward_batch.sampling_info, "temperatures", None)
        return metadata

    def forward(
        self: Any,
        pruned_states: Any,
        sample_indices: Any,
        input_logprob_indices: Any,
        token_to_seq_idx: list[int],
        lm_head: Any,
        get_logits_fn: Any,
        logits_metadata: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        temperatures = getattr(logits_metadata, "rlbridge_temperatures", None)
        if temperatures is not None and len(input_logprob_indices) and bool((temperatures != 1).any()):
            scale = _scale_of_rows(temperatures.reshape(-1), pruned_states.shape[0], input_logprob_indices, token_to_seq_idx)
            get_logits_fn = _Scaled(get_logits_fn, scale)
        return compute(
            self,
            pruned_states,
            sample_indices,
            input_logprob_indices,
            token_to_seq_idx,
            lm_head,
            get_logits_fn,
            logits_metadata,
            *args,
            **kwargs,
        )

    LogitsMetadata.from_forward_batch = classmethod(from_forward_batch)
    InputLogprobProcessor.forward = forward


def _scale_of_rows(temperatures_B: Any, rows: int, indices: Any, token_to_seq_idx: list[int]) -> Any:
    """What the logits of each row are divided by: its request's temperature, or 1."""
    import torch

    of_row = torch.tensor(token_to_seq_idx[:rows], device=temperatures_B.device)
    scale_R = torch.ones(rows, dtype=temperatures_B.dtype, device=temperatures_B.device)
    indices = torch.as_tensor(indices, device=scale_R.device).long()
    scale_R[indices] = temperatures_B[of_row[indices]]
    return scale_R


class _Scaled:
    """`get_logits_fn` over consecutive chunks of rows, each row divided by its part of `scale_R`."""

    def __init__(self, get_logits: Any, scale_R: Any) -> None:
        self._get_logits, self._scale_R, self._start = get_logits, scale_R, 0

    def __call__(self, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        logits_RV = self._get_logits(hidden_states, *args, **kwargs)
        end = self._start + logits_RV.shape[0]
        scale_R1 = self._scale_R[self._start : end, None].to(logits_RV.dtype)
        self._start = end
        return logits_RV / scale_R1
