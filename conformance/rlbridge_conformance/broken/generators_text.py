"""Broken generators: what they say, and what becomes of their requests."""

from __future__ import annotations

from typing import Any

import msgspec
import torch

from rlbridge.errors import SyncError
from rlbridge.roles.batch import Completion, Sampling
from rlbridge.roles.generator import PauseMode
from rlbridge_conformance.broken.catalogue import broken
from rlbridge_conformance.reference.generator import ReferenceGenerator
from rlbridge_conformance.reference.requests import Request

_LOG_PROBS = "contract.log_probs_of_text_are_its_scores"
_CUTS = "contract.cuts_leave_the_likeliest_tokens"
_ENDS = "contract.completions_end_where_they_should"
_STAMPS = "contract.tokens_carry_the_version_that_made_them"
_WAITS = "contract.a_pause_that_waits_lets_requests_end"
_ABORTS = "contract.a_pause_that_aborts_loses_no_token"
_HELD = "contract.held_requests_go_on_with_the_new_weights"
_SEED = "contract.a_seed_fixes_what_is_sampled"


@broken("generator", check="contract.greedy_text_follows_the_weights")
class SaysOddTokensAfterAnUpdate(ReferenceGenerator):
    """Picks among half of the vocabulary, once it has been updated."""

    def pick(self, logprobs_V: torch.Tensor, request: Request) -> int:
        even_V = torch.arange(len(logprobs_V)) % 2 == 0
        return super().pick(logprobs_V.masked_fill(even_V, -torch.inf) if self.version else logprobs_V, request)


@broken("generator", check="contract.a_warm_prefix_is_read_anew")
class KeepsThePrefixCache(ReferenceGenerator):
    """Keeps keys and values of prompts that were made with the old weights."""

    def invalidate_caches(self) -> None:
        pass


@broken("generator", check=_LOG_PROBS)
class TellsLogProbsAfterTheCut(ReferenceGenerator):
    """Tells the log-probs of what top-k and top-p have left."""

    def advance(self, request: Request) -> None:
        super().advance(request)
        sampling, token = request.sampling, request.completion.token_ids[-1]
        if sampling.top_k or sampling.top_p < 1:
            kv_LSBKTH, request.kv_LSBKTH = request.kv_LSBKTH, None
            request.completion.token_ids.pop()
            left_V = self.top_p(self.top_k(self.next_logprobs(request), sampling.top_k), sampling.top_p).log_softmax(-1)
            request.completion.token_ids.append(token)
            request.completion.logprobs[-1], request.kv_LSBKTH = float(left_V[token]), kv_LSBKTH


@broken("generator", check=_LOG_PROBS)
class TellsLogProbsAtTemperatureOne(ReferenceGenerator):
    """Samples at temperature 1, whatever is asked for."""

    def next_logprobs(self, request: Request) -> torch.Tensor:
        return (super().next_logprobs(request) * (request.sampling.temperature or 1.0)).log_softmax(-1)


@broken("generator", check="contract.a_batch_says_what_each_prompt_says_alone")
class AnswersTheShortestFirst(ReferenceGenerator):
    """Gives the completions of a large batch in the order in which they end."""

    def generate(self, prompts: list[list[int]], sampling: Sampling) -> list[Completion]:
        said = super().generate(prompts, sampling)
        return sorted(said, key=lambda completion: len(completion.token_ids)) if len(prompts) > 5 else said


@broken("generator", check=_SEED)
class IgnoresTheSeed(ReferenceGenerator):
    """Samples anew with each call, whatever the seed."""

    def make_requests(self, prompts: list[list[int]], sampling: Sampling) -> list[Request]:
        return super().make_requests(prompts, msgspec.structs.replace(sampling, seed=None))


@broken("generator", check=_SEED)
class HasOneSeed(ReferenceGenerator):
    """Samples the same with every seed."""

    def make_requests(self, prompts: list[list[int]], sampling: Sampling) -> list[Request]:
        return super().make_requests(prompts, msgspec.structs.replace(sampling, seed=0))


@broken("generator", check=_CUTS)
class IgnoresTopK(ReferenceGenerator):
    """Samples of all tokens, whatever top-k is."""

    def top_k(self, logprobs_V: torch.Tensor, k: int) -> torch.Tensor:
        return logprobs_V


@broken("generator", check=_CUTS)
class IgnoresTopP(ReferenceGenerator):
    """Samples of all tokens, whatever top-p is."""

    def top_p(self, logprobs_V: torch.Tensor, p: float) -> torch.Tensor:
        return logprobs_V


@broken("generator", check=_ENDS)
class LeavesOutTheStopToken(ReferenceGenerator):
    """Does not give the token that ended a completion."""

    def generate(self, prompts: list[list[int]], sampling: Sampling) -> list[Completion]:
        said = super().generate(prompts, sampling)
        return [_without_last(c) if c.finish_reason == "stop" else c for c in said]


def _without_last(said: Completion) -> Completion:
    return Completion(said.token_ids[:-1], said.logprobs[:-1], said.versions[:-1], said.finish_reason)


@broken("generator", check=_ENDS)
class KnowsOnlyTheCallsStopTokens(ReferenceGenerator):
    """Goes on after the model's own end-of-sequence token."""

    def ends(self, token: int, sampling: Sampling) -> bool:
        return token in sampling.stop_token_ids


@broken("generator", check=_ENDS)
class KnowsOnlyTheModelsStopTokens(ReferenceGenerator):
    """Goes on after a stop token of the call."""

    def ends(self, token: int, sampling: Sampling) -> bool:
        return token in self.config.stop_ids


@broken("generator", check=_STAMPS)
class StampsNothingWithoutASeed(ReferenceGenerator):
    """Says of tokens that are sampled without a seed that version 0 made them."""

    def advance(self, request: Request) -> None:
        super().advance(request)
        if request.sampling.seed is None and request.sampling.temperature:
            request.completion.versions[-1] = 0


@broken("generator", check=_STAMPS)
class StampsTheVersionBefore(ReferenceGenerator):
    """Says of each token that the version before made it."""

    def advance(self, request: Request) -> None:
        super().advance(request)
        request.completion.versions[-1] -= 1


@broken("generator", check=_WAITS)
class HoldsWhereItShouldWait(ReferenceGenerator):
    """Holds requests that it should let end."""

    def pause(self, mode: PauseMode = "wait") -> None:
        super().pause("keep" if mode == "wait" else mode)


@broken("generator", check=_WAITS)
class BeginsRequestsInAPause(ReferenceGenerator):
    """Begins requests though it is paused."""

    def admit(self, left: list[Request]) -> None:
        for request in left:
            if request.state == "waiting":
                request.state = "running"


@broken("generator", check=_WAITS)
class IgnoresPauses(ReferenceGenerator):
    """Goes on with everything in a pause."""

    def pause(self, mode: PauseMode = "wait") -> None:
        pass


@broken("generator", check=_ABORTS)
class LosesTokensAtAnAbort(ReferenceGenerator):
    """Gives nothing of what an aborted request had."""

    def abort_all(self) -> None:
        for request in self.requests:
            if request.state != "done":
                request.completion = Completion([], [], [], "")
        super().abort_all()


@broken("generator", check=_ABORTS)
class LetsRequestsEndAtAnAbort(ReferenceGenerator):
    """Waits for requests that it should end."""

    def pause(self, mode: PauseMode = "wait") -> None:
        super().pause("wait" if mode == "abort" else mode)


@broken("generator", check=_HELD)
class KeepsRunningKeysAndValues(ReferenceGenerator):
    """Goes on with keys and values that the old weights made."""

    def hold_running(self) -> None:
        pass


@broken("generator", check=_HELD)
class BeginsHeldRequestsAgain(ReferenceGenerator):
    """Throws away what a held request had, and begins it again."""

    def hold_running(self) -> None:
        super().hold_running()
        for request in self.requests:
            if request.state == "running":
                request.completion = Completion([], [], [], "")


@broken("generator", check="contract.pausing_twice_is_harmless")
class ResumesOnlyWhatIsPaused(ReferenceGenerator):
    """Takes a second `resume` for an error."""

    def resume(self) -> None:
        if self.paused is None:
            raise SyncError("the engine is not paused")
        super().resume()


@broken("generator", check="contract.generation_goes_on_while_bytes_arrive")
class WaitsForBytes(ReferenceGenerator):
    """Generates nothing while bytes arrive."""

    def on_each_rank(self, method: str, payload: bytes, tensors: dict[str, list[Any]] | None = None) -> list[bytes]:
        if method != "wait_pull":
            return super().on_each_rank(method, payload, tensors)
        with self.turn:
            return super().on_each_rank(method, payload, tensors)
