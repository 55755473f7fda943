"""The settings of published models in the sweep (`tools/published.py`): each does something."""

import pytest
import torch

from tests.support.helpers import prompt
from tools.published import PUBLISHED

pytestmark = pytest.mark.newest_only


@pytest.mark.parametrize("name", PUBLISHED)
@torch.no_grad()
def test_each_setting_changes_what_the_model_gives(name):
    """A setting of which the configuration knows nothing, or which is the default, would try nothing."""
    from tools.architectures import CEILING, build  # not to be imported on older releases

    def logits(settings: dict) -> torch.Tensor:
        """What a tiny model with these settings gives for more tokens than it was trained to."""
        return build(model_type, CEILING, settings)(input_ids=prompt(40)).logits

    model_type, settings = PUBLISHED[name]
    settings = settings(CEILING) if callable(settings) else settings
    expected = logits(settings)
    for setting in settings.keys() - {"num_hidden_layers"}:  # of a type by default, there may be as many
        others = {other: value for other, value in settings.items() if other != setting}
        try:
            without = logits(others)
        except Exception:
            continue  # the others can't be without it
        assert not torch.equal(without, expected), f"{setting} changes nothing"
