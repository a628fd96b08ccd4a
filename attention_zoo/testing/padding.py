"""What is not there, and who else is: padding on either side and in holes, neighbours in a batch, packed documents."""

from __future__ import annotations

import torch

from attention_zoo.contract import Tokens
from attention_zoo.testing.case import MANY, PRIME, WIDE, Case, close, gradients, ragged, run, same
from attention_zoo.testing.check import check


@check()
def padding_contents_never_matter(case: Case) -> None:
    """NaN, infinity or large numbers at padding: valid outputs and all gradients stay bitwise equal, all is finite."""
    for causal in case.sides:
        layer = case.build(causal=causal)
        for layout, tokens in case.layouts(PRIME):
            if bool(tokens.valid.all()):
                continue
            x, valid = case.data(3, PRIME), tokens.valid
            results = []
            for content in (0.0, 1e6, torch.inf, torch.nan):
                filled = torch.where(valid[..., None], x, content).requires_grad_()
                out = layer(filled, tokens).hidden
                where = f"{case.name} causal={causal} {layout}, {content} at padding"
                assert bool(out.isfinite().all()), f"{where}: the output is not finite"
                grads = gradients(layer, filled, out, valid)
                assert bool((grads["x"][~valid] == 0).all()), f"{where}: padding has a gradient"
                results.append((out, grads))
                same(out[valid], results[0][0][valid], f"{where}: hidden")
                for name, grad in grads.items():
                    same(grad, results[0][1][name], f"{where}: gradient of {name}")


@check()
def a_row_of_padding_is_finite(case: Case) -> None:
    """A row without a single valid token gives finite outputs and gradients, and leaves the others alone."""
    for causal in case.sides:
        layer = case.build(causal=causal)
        x = case.data(3, PRIME).requires_grad_()
        tokens = Tokens.of(ragged(PRIME, [PRIME, 0, 5]))
        out = layer(x, tokens).hidden
        where = f"{case.name} causal={causal}: beside an empty row"
        assert bool(out.isfinite().all()), f"{where}, the output is not finite"
        for name, grad in gradients(layer, x, out, tokens.valid).items():
            assert bool(grad.isfinite().all()), f"{where}, the gradient of {name} is not finite"
        close(out[:1], run(layer, x[:1]).hidden, where)


@check()
def a_row_alone_equals_itself_in_a_batch(case: Case) -> None:
    """Each row without its padding, called by itself."""
    for causal in case.sides:
        for length, tile in ((PRIME, 4), (MANY, WIDE)):
            layer = case.build(causal=causal, tile=tile)
            x = case.data(3, length)
            for layout, tokens in case.layouts(length):
                whole = run(layer, x, tokens).hidden
                for row in range(3):
                    at = tokens.valid[row]
                    alone = Tokens.of(at[at][None], tokens.is_global[row][at][None], tokens.document[row][at][None])
                    found = run(layer, x[row : row + 1, at], alone).hidden
                    close(found[0], whole[row, at], f"{case.name} causal={causal} length {length} {layout}: row {row}")


@check()
def documents_in_one_row_equal_documents_apart(case: Case) -> None:
    """Packing changes nothing: neither attention nor memory crosses documents."""
    sizes = [case.border + 1, 1, PRIME, 2 * case.border]
    document = torch.repeat_interleave(torch.arange(4), torch.tensor(sizes))[None]
    valid = torch.ones_like(document, dtype=torch.bool)
    tokens = Tokens.of(valid, case.globals(valid), document)
    for causal in case.sides:
        layer = case.build(causal=causal)
        x = case.data(1, sum(sizes)).requires_grad_()
        packed = layer(x, tokens).hidden
        apart = []
        for index in range(4):
            at = document[0] == index
            apart.append(layer(x[:, at], Tokens.of(valid[:, at], tokens.is_global[:, at])).hidden)
        where = f"{case.name} causal={causal}: packed documents"
        close(packed, torch.cat(apart, 1), where)
        expected = gradients(layer, x, torch.cat(apart, 1), valid)
        for name, grad in gradients(layer, x, packed, valid).items():
            close(grad, expected[name], f"{where}, gradient of {name}", 1e-11)
