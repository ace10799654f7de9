"""A BitNet b1.58 model decoding: transformers' own BitLinear against the ternary kernel.

The shape is the 2B model's (30 layers of 2560, feed-forward 6912, vocabulary 128256) cut to 6 layers,
and the vocabulary to a fifth as well, so that the head keeps its share. Weights are random.
"""

from __future__ import annotations

import copy
import functools

import torch
from torch import nn
from transformers import BitNetConfig, BitNetForCausalLM, DynamicCache
from transformers.integrations.bitnet import BitLinear, pack_weights, replace_with_bitnet_linear
from transformers.utils.quantization_config import BitNetQuantConfig

from bench.peers.common import Side, arguments, measure, relative_error

LAYERS, VOCAB = 6, 128256 * 6 // 30
PROMPT = 32
BOUND = 1e-6


def stock_model() -> nn.Module:
    """transformers' model as a packed checkpoint loads it, in float32."""
    torch.manual_seed(0)
    config = BitNetConfig(
        num_hidden_layers=LAYERS, vocab_size=VOCAB, bos_token_id=1, eos_token_id=2, dtype="float32"
    )
    model = BitNetForCausalLM(config).eval()
    replace_with_bitnet_linear(model, ["lm_head"], BitNetQuantConfig())
    for module in model.modules():
        if isinstance(module, BitLinear):
            ternary = torch.randint(-1, 2, (module.out_features, module.in_features))
            module.to_empty(device="cpu")
            module.weight.copy_(pack_weights(ternary))
            module.weight_scale.fill_(module.in_features**0.5)  # outputs are divided by it
    return model


def our_model(stock: nn.Module) -> nn.Module:
    """The same with every BitLinear's codes in our kernel's packing."""
    from effinfer.nn import LowBitLinear
    from effinfer.quant.loaders.bitnet import bitnet_weight

    model = copy.deepcopy(stock)
    for name, module in list(model.named_modules()):
        if isinstance(module, BitLinear):
            weight = bitnet_weight(
                module.weight, module.weight_scale, out_features=module.out_features, name=name
            )
            layer = LowBitLinear.from_weight(weight, module.bias, activations="int8")
            model.set_submodule(name, layer)
    return model


@torch.compiler.set_stance("force_eager")
def layer_error(stock: nn.Module, ours: nn.Module) -> float:
    """The worst relative L2 error of our layers on the inputs of the stock model's layers, as those
    round them: a value halfway between two codes may go either way.

    Logits are no measure: layers later, a code that rounds the other way has moved all of them.
    """
    errors = []
    replaced = dict(ours.named_modules())

    def compare(name: str, module: nn.Module, inputs: tuple[torch.Tensor], y: torch.Tensor) -> None:
        codes, scale = module.activation_quant(inputs[0])
        errors.append(relative_error(replaced[name](codes / scale), y))

    hooks = [
        module.register_forward_hook(functools.partial(compare, name))
        for name, module in stock.named_modules()
        if isinstance(module, BitLinear)
    ]
    stock(torch.arange(PROMPT)[None])
    for hook in hooks:
        hook.remove()
    return max(errors)


class Step:
    """Logits of one more token after the same prompt, again and again."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.cache = DynamicCache(config=model.config)
        ids = torch.arange(PROMPT)[None]
        model(ids, past_key_values=self.cache)

    def run(self) -> torch.Tensor:
        token = torch.tensor([[1]])
        logits = self.model(token, past_key_values=self.cache).logits
        self.cache.crop(-1)
        return logits


def main() -> None:
    args = arguments(__doc__)
    stock = stock_model()
    with torch.inference_mode():
        ours = our_model(stock)
        error = layer_error(stock, ours)
    if not error <= BOUND:
        raise AssertionError(f"a layer's relative error {error:.2e} exceeds {BOUND:.0e}")

    def eager() -> Side:
        return Side(torch.compiler.set_stance("force_eager")(Step(stock).run))

    measure(
        "bitnet",
        f"BitNet 2B's shape, {LAYERS} layers, decode, threads={args.threads}",
        {
            "effinfer": lambda: Side(Step(ours).run),
            "transformers": lambda: Side(Step(stock).run),
            "transformers, not compiled": eager,
        },
        args,
        unit={"tok/s": 1},
        facts=lambda: {"layer_error": error},
    )


if __name__ == "__main__":
    main()
