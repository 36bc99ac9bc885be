"""The controls of the experiment with mixtures of heads are what they say."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments import moh


def test_random_heads_are_as_many_and_spare_the_shared_ones():
    active = jnp.ones((3, 40, moh.NUM_SHARED + moh.ROUTED))
    drawn = np.asarray(moh.random_heads(active, jax.random.key(0), None))
    assert (drawn[..., : moh.NUM_SHARED] == 1).all()
    assert (drawn[..., moh.NUM_SHARED :].sum(-1) == moh.TOP_K).all()
    assert (drawn.mean((0, 1)) > 0.4).all() and len(np.unique(drawn.reshape(120, -1), axis=0)) > 8


def test_claims_follow_the_numbers():
    """Made-up results with one claim broken."""
    alike = {"pattern similarity": [0.3], "output cosine": [0.0]}
    model = lambda loss, busy=1.2: {"loss": [loss] * 3, "busiest": [[busy, 1.0]] * 3, **alike}
    results = {
        "mha": model(2.00), "moh-75": model(2.01), "random-75": model(2.02),
        "no-balance": model(2.0, 3.0), "routed-only": model(2.05),
    }  # fmt: skip
    claims = moh.claims_of(results)
    assert [claim.holds for claim in claims] == [True, False, True, True, True, True, True]
