"""The alert calls of the trackers that a run has started; none is imported for it."""

import logging
import sys

logger = logging.getLogger(__name__)


def alert(title: str, text: str, *, is_over: bool) -> list[str]:
    """Sends an alert through every tracker with a running run, and says through which; `is_over`: an error.

    A tracker that cannot send it says so in the log: no training run should end for want of an alert.
    """
    sent = []
    for name, send in (("trackio", by_trackio), ("wandb", by_wandb)):
        if name in sys.modules:
            try:
                if send(title, text, is_over):
                    sent.append(name)
            except Exception as error:  # of another library, on its way to a server
                logger.warning("%s could not send the alert: %s", name, error)
    return sent


def by_trackio(title: str, text: str, is_over: bool) -> bool:
    """Sends an alert to the run that is open in trackio; False where none is."""
    import trackio  # pyright: ignore[reportMissingImports]

    if trackio.context_vars.current_run.get() is None:
        return False
    trackio.alert(title=title, text=text, level=trackio.AlertLevel.ERROR if is_over else trackio.AlertLevel.WARN)
    return True


def by_wandb(title: str, text: str, is_over: bool) -> bool:
    """Sends an alert to the run that is open in W&B; False where none is."""
    import wandb  # pyright: ignore[reportMissingImports]

    if wandb.run is None:
        return False
    wandb.run.alert(title=title, text=text, level=wandb.AlertLevel.ERROR if is_over else wandb.AlertLevel.WARN)
    return True
