"""Write the reference arrays of `test_transformerlens_parity.py` with TransformerLens.

    python tests/discovery/make_transformerlens_arrays.py     # in an environment with
                                                              # torch and transformer-lens >= 3

For three tiny random Hugging Face models (GPT-2, GPT-NeoX with parallel residuals, Llama with
grouped queries) run by `TransformerBridge` with unprocessed weights: logits, logits under zero
ablation, activation patching of every head, path patching to the logits and to inputs of heads, and
direct logit attribution. Each file holds the weights too (float16 values, used as float32 on both
sides), so that the tests need neither torch nor this script. About 40 kB a model; no pickle.
"""

import json
import tempfile
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models
from transformer_lens.model_bridge import TransformerBridge

V, B, T = 61, 3, 7
SIZES = {
    "vocab_size": V,
    "max_position_embeddings": 32,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 40,
}
CASES = {
    "gpt2": (
        transformers.GPT2LMHeadModel,
        transformers.GPT2Config(
            vocab_size=V, n_positions=32, n_embd=32, n_layer=3, n_head=4, n_inner=40
        ),
    ),
    "gpt_neox": (
        transformers.GPTNeoXForCausalLM,
        transformers.GPTNeoXConfig(**SIZES, rotary_pct=0.5, tie_word_embeddings=False),
    ),
    "llama": (
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=False),
    ),
}
ABLATED = [(1, 2), (0, 1)]
RECEIVERS = {"q": (2, 1), "k": (2, 1), "v": (2, 0)}
L, H = 3, 4


def fill(model) -> None:
    """Random parameters, norms and biases included, exactly representable in float16."""
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        centre = 1.0 if "norm" in name or "ln_" in name else 0.0
        centre = 0.0 if name.endswith("bias") else centre
        scale = 0.1 if p.ndim == 1 else p.shape[-1] ** -0.5
        p.data = (centre + scale * noise).half().float()


def bridge_of(model) -> TransformerBridge:
    """TransformerLens around the model; it insists on a tokenizer."""
    raw = Tokenizer(models.WordLevel({f"t{n}": n for n in range(V)}, unk_token="t0"))
    special = {"bos_token": "t1", "eos_token": "t2", "unk_token": "t0", "pad_token": "t2"}
    with tempfile.TemporaryDirectory() as place:
        wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, **special)
        wrapped.save_pretrained(place)
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(place)
        return TransformerBridge.boot_transformers(
            "tiny", hf_model=model, device="cpu", tokenizer=tokenizer
        )


class Lens:
    """The measurements, on one model and one pair of prompts."""

    def __init__(self, model, tokens, corrupt, answer, wrong):
        self.weights = {k: v.double() for k, v in model.state_dict().items()}
        self.bridge = bridge_of(model)  # renames the model's parameters
        self.tokens, self.corrupt = torch.from_numpy(tokens), torch.from_numpy(corrupt)
        self.answer, self.wrong = answer, wrong
        self.rows = np.arange(B)
        self.clean = self.cache(self.tokens)
        self.dirty = self.cache(self.corrupt)

    def cache(self, tokens) -> dict[str, torch.Tensor]:
        _, cache = self.bridge.run_with_cache(tokens)
        return {k: v.clone() for k, v in cache.items() if isinstance(v, torch.Tensor)}

    def logits(self, hooks=(), tokens=None) -> np.ndarray:
        tokens = self.tokens if tokens is None else tokens
        return self.bridge.run_with_hooks(tokens, fwd_hooks=list(hooks)).numpy()

    def score(self, logits: np.ndarray) -> float:
        last = logits[:, -1]
        gap = last[self.rows, self.answer] - last[self.rows, self.wrong]
        return float(gap.astype(np.float64).mean())

    def write(self, layer, part, head, values, slots=slice(None)):
        """A hook that writes `values` of a head at some slots."""

        def hook(x, hook):
            x = x.clone()
            x[:, slots, head] = values[:, slots, head]
            return x

        return f"blocks.{layer}.attn.hook_{part}", hook

    def ablated(self) -> np.ndarray:
        zeros = torch.zeros_like(self.clean["blocks.0.attn.hook_z"])
        return self.logits([self.write(n, "z", h, zeros) for n, h in ABLATED])

    def patched(self, slots=slice(None)) -> np.ndarray:
        """[L,H] the score with z of one head taken from the corrupt run."""
        out = np.zeros((L, H))
        for n in range(L):
            source = self.dirty[f"blocks.{n}.attn.hook_z"]
            for h in range(H):
                out[n, h] = self.score(self.logits([self.write(n, "z", h, source, slots)]))
        return out

    def frozen(self, layer, head, slots, freeze_mlps):
        """Hooks of a pass in which only the sender's z is corrupt and the other heads are clean."""
        hooks = []
        for n in range(L):
            name = f"blocks.{n}.attn.hook_z"
            mixed = self.clean[name].clone()
            if n == layer:
                mixed[:, slots, head] = self.dirty[name][:, slots, head]
            hooks.append((name, lambda x, hook, mixed=mixed: mixed.clone()))
            if freeze_mlps:
                name = f"blocks.{n}.hook_mlp_out"
                hooks.append((name, lambda x, hook, name=name: self.clean[name].clone()))
        return hooks

    def path(self, receiver=None, slots=slice(-1, None), freeze_mlps=False) -> np.ndarray:
        """[L,H] (patched - clean) / (corrupt - clean); `receiver` = (layer, head, part)."""
        clean, corrupt = self.score(self.logits()), self.score(self.logits(tokens=self.corrupt))
        out = np.zeros((L, H))
        for n in range(L if receiver is None else receiver[0]):
            for h in range(H):
                hooks = self.frozen(n, h, slots, freeze_mlps)
                if receiver is not None:
                    hooks = [self.receive(receiver, slots, hooks)]
                out[n, h] = (self.score(self.logits(hooks)) - clean) / (corrupt - clean)
        return out

    def receive(self, receiver, slots, hooks):
        """A hook that writes what the receiver got in the frozen pass."""
        layer, head, part = receiver
        got = {}

        def keep(x, hook):
            got["x"] = x.clone()
            return x

        self.logits([*hooks, (f"blocks.{layer}.attn.hook_{part}", keep)])
        return self.write(layer, part, head, got["x"], slots)

    def attribution(self) -> np.ndarray:
        """[L,H] each head's term of the logit difference at the last token.

        The final norm is linear at its recorded scale; its weight and centring are applied here,
        since the weights are unprocessed. Averaged over prompts.
        """
        sd = self.weights
        pick = lambda *names: next(sd[n] for n in names if n in sd)
        weight = pick("transformer.ln_f.weight", "gpt_neox.final_layer_norm.weight",
                      "model.norm.weight")  # fmt: skip
        unembed = pick("lm_head.weight", "embed_out.weight")  # [V,M]
        direction = (unembed[self.answer] - unembed[self.wrong]) * weight  # [B,M]
        if "model.norm.weight" not in sd:  # LayerNorm takes the mean away
            direction = direction - direction.mean(-1, keepdim=True)
        direction = direction / self.clean["ln_final.hook_scale"][:, -1].double()
        out = np.zeros((L, H))
        for n in range(L):
            z = self.clean[f"blocks.{n}.attn.hook_z"][:, -1].double()  # [B,H,D]
            wo = self.bridge.blocks[n].attn.W_O.double()  # [H,D,M]
            out[n] = torch.einsum("bhd,hdm,bm->h", z, wo, direction).numpy() / B
        return out


def main() -> None:
    torch.set_grad_enabled(False)
    here = Path(__file__).parent / "transformerlens"
    here.mkdir(exist_ok=True)
    versions = {n: metadata.version(n) for n in ("transformer-lens", "torch", "transformers")}
    for name, (kind, config) in CASES.items():
        rng = np.random.default_rng(1)
        config._attn_implementation = "eager"
        model = kind(config).eval()
        fill(model)
        tokens = rng.integers(3, V, (B, T))
        corrupt = tokens.copy()
        corrupt[:, 2:4] = rng.integers(3, V, (B, 2))
        corrupt[:, -1] = rng.integers(3, V, B)
        answer, wrong = np.array([5, 9, 20]), np.array([6, 8, 33])
        weights = {
            f"weights/{k}": v.half().numpy() for k, v in model.state_dict().items()
            if v.is_floating_point() and not k.endswith(("masked_bias", "inv_freq"))
        }  # fmt: skip
        lens = Lens(model, tokens, corrupt, answer, wrong)
        everywhere = slice(None)
        arrays = {
            "logits": lens.logits(),
            "ablated": lens.ablated(),
            "patched": lens.patched(),
            "patched_last": lens.patched(slice(-1, None)),
            "path_logits": lens.path(),
            "path_logits_frozen_mlps": lens.path(freeze_mlps=True),
            "path_q": lens.path((*RECEIVERS["q"], "q")),
            "path_k": lens.path((*RECEIVERS["k"], "k"), everywhere),
            "path_v": lens.path((*RECEIVERS["v"], "v"), everywhere),
            "attribution": lens.attribution(),
        }
        about = {"versions": versions, "ablated": ABLATED, "receivers": RECEIVERS}
        np.savez_compressed(
            here / f"{name}.npz",
            config=np.asarray(json.dumps(config.to_dict())),
            about=np.asarray(json.dumps(about)),
            tokens=tokens.astype(np.int32),
            corrupt=corrupt.astype(np.int32),
            answer=answer.astype(np.int32),
            wrong=wrong.astype(np.int32),
            **weights,
            **{k: np.asarray(v, np.float32) for k, v in arrays.items()},
        )
        print(name, {k: float(np.std(v)) for k, v in arrays.items()})


if __name__ == "__main__":
    main()
