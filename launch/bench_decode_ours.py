"""Our side of `bench.py decode`, in a process of its own: the trie beam search, and the same answers found by scoring every item."""

import sys

import torch
from bench_decode_peers import Call, catalogue, decode_steps, described
from bench_step_ours import peer_batch
from bench_step_peers import Steps, serve
from torch import Tensor

from gpr_dist.decoding.beam_search import beam_search
from gpr_dist.decoding.legality import Legal
from gpr_dist.decoding.model_decoder import ModelDecoder
from gpr_dist.decoding.trie import Trie
from gpr_dist.model.gpr import GPR, GPRConfig

# B requests  K beams  N items of the catalogue  L levels  D width

SMALL_CATALOGUE = 500


def ours(settings: dict) -> Steps:
    """A GPR on journeys of the peers' length, one request each."""
    config = GPRConfig(**settings["model"])
    device = torch.device(settings["device"])
    torch.manual_seed(settings["seed"])
    model = GPR(config).to(device).eval()
    decode = ModelDecoder(model, device)
    shape = {"positions": settings["tokens"], "organic": settings["organic"], "every_request": False}
    tries: dict[int, Trie] = {}

    def decoder(codes_NL: Tensor, beams: int, batch: int) -> Call:
        if len(codes_NL) not in tries:
            tries[len(codes_NL)] = Trie.from_codes(codes_NL, config.codebook_size).to(device)
        trie = tries[len(codes_NL)]
        legal, group_B = Legal(trie, trie.legal_nodes([None])), torch.zeros(batch, dtype=torch.long, device=device)
        batches = [peer_batch(config, rows=batch, seed=number, **shape).to(device) for number in range(settings["requests"] // batch)]

        @torch.inference_mode()
        def call(number: int) -> Tensor:
            state = decode.start(batches[number % len(batches)])
            return beam_search(lambda *prefixes: decode.step_log_probs(state, *prefixes), trie, legal, group_B, beams).codes_BKL

        return call

    @torch.inference_mode()
    def brute_force() -> dict:
        """The search over a small catalogue beside all of its items scored at once, codes given, for 4 requests."""
        codes_NL = catalogue(SMALL_CATALOGUE, settings).to(device)
        batch = peer_batch(config, rows=4, seed=0, **shape).to(device)
        trie, state = Trie.from_codes(codes_NL, config.codebook_size).to(device), decode.start(batch)
        found = beam_search(lambda *prefixes: decode.step_log_probs(state, *prefixes), trie, trie.legal_nodes([None]),
                            torch.zeros(4, dtype=torch.long, device=device), SMALL_CATALOGUE)
        request_N, given_NL = torch.arange(4, device=device).repeat_interleave(SMALL_CATALOGUE), codes_NL.repeat(4, 1)
        state_NLD = model.ptd(state, task="generate", request_N=request_N, head_N=torch.zeros_like(request_N),
                              prefix_NlD=model.codes(given_NL[:, :-1]))
        scores_NL = model.codes(state_NLD, task="logits").log_softmax(-1).gather(2, given_NL[..., None])[..., 0]
        best = scores_NL.sum(1).view(4, -1).sort(descending=True)
        return {"items": SMALL_CATALOGUE, "largest_difference": float((best.values - found.score_BK).abs().max()),
                "same_order": float((codes_NL[best.indices] == found.codes_BKL).all(2).float().mean())}

    return decode_steps(decoder, settings, device) | {"describe": lambda: described(model), "brute force": brute_force}


if __name__ == "__main__":
    serve({"ours": ours}, sys.argv[1:])
