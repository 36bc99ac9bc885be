"""The peer's side of `benchmarks.sweep_vs_transformerlens`: runs in TransformerLens' environment.

Reads commands from standard input, one a line, and answers each with one line of JSON: ``run FILE``
patches every head once and writes the metric [L,H] to FILE (npy). Works with `HookedTransformer`
(TransformerLens 2) and with `TransformerBridge` (3 and later).
"""

import json
import sys
import time
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
import transformers


def load(directory: str):
    """The GPT-2 model in `directory` as TransformerLens runs it, weights unprocessed."""
    hf = transformers.GPT2LMHeadModel.from_pretrained(directory, attn_implementation="eager")
    hf = hf.eval().to(DEVICE)
    try:
        from transformer_lens import HookedTransformer, HookedTransformerConfig
        from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights
    except ImportError:
        return _bridge(hf, directory), "TransformerBridge"
    c = hf.config
    cfg = HookedTransformerConfig(
        n_layers=c.n_layer,
        d_model=c.n_embd,
        n_ctx=c.n_positions,
        d_head=c.n_embd // c.n_head,
        n_heads=c.n_head,
        d_vocab=c.vocab_size,
        act_fn="gelu_new",
        eps=c.layer_norm_epsilon,
        normalization_type="LN",
        device=DEVICE,
    )
    model = HookedTransformer(cfg)
    model.load_state_dict(convert_gpt2_weights(hf, cfg), strict=False)
    return model, "HookedTransformer"


def _bridge(hf, directory: str):
    from tokenizers import Tokenizer, models
    from transformer_lens.model_bridge import TransformerBridge

    words = {f"t{n}": n for n in range(hf.config.vocab_size)}
    raw = Tokenizer(models.WordLevel(words, unk_token="t0"))
    special = {"bos_token": "t1", "eos_token": "t2", "unk_token": "t0", "pad_token": "t2"}
    place = Path(directory) / "tokenizer"  # the bridge asks for one, and never uses it here
    transformers.PreTrainedTokenizerFast(tokenizer_object=raw, **special).save_pretrained(place)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(place)
    return TransformerBridge.boot_transformers(
        "gpt2", hf_model=hf, device=DEVICE, tokenizer=tokenizer
    )


def sweep(model, prompts) -> np.ndarray:
    """[L,H] logit difference at the last token with z of one head patched at a time."""
    tokens, donor = (torch.from_numpy(prompts[n]).to(DEVICE) for n in ("tokens", "donor"))
    answer, wrong = (torch.from_numpy(prompts[n]).to(DEVICE) for n in ("answer", "wrong"))
    rows = torch.arange(len(tokens), device=DEVICE)
    is_z = lambda name: name.endswith("attn.hook_z")
    _, cache = model.run_with_cache(donor, names_filter=is_z)
    num_layers, num_heads = model.cfg.n_layers, model.cfg.n_heads
    out = np.zeros((num_layers, num_heads), np.float32)
    for layer in range(num_layers):
        name = f"blocks.{layer}.attn.hook_z"
        source = cache[name]
        for head in range(num_heads):

            def patch(z, hook, head=head, source=source):
                z = z.clone()
                z[:, :, head] = source[:, :, head]
                return z

            last = model.run_with_hooks(tokens, fwd_hooks=[(name, patch)])[:, -1]
            out[layer, head] = float((last[rows, answer] - last[rows, wrong]).mean())
    return out


def main() -> None:
    global DEVICE
    directory, threads, DEVICE = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries print
    torch.set_grad_enabled(False)
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model, api = load(directory)
    prompts = np.load(Path(directory) / "prompts.npz", allow_pickle=False)
    model(torch.from_numpy(prompts["tokens"]).to(DEVICE))
    versions = {n: metadata.version(n) for n in ("transformer-lens", "torch", "transformers")}
    print(json.dumps({"api": api, "versions": versions}), file=answers, flush=True)
    for line in sys.stdin:
        begin = time.perf_counter()
        scores = sweep(model, prompts)
        seconds = time.perf_counter() - begin
        np.save(line.split()[1], scores)
        print(json.dumps({"seconds": seconds}), file=answers, flush=True)


if __name__ == "__main__":
    main()
