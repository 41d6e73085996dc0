"""Upper bounds of every wait: a section of ``common/config/run.py``."""

from typing import Self

from pydantic import model_validator

from fedphd.common.config.data import Section, setting


class WaitConfig(Section):
    """Upper bounds of every wait, in seconds."""

    start_s: float = setting(300.0, "seconds for edges and clients to join at the start", gt=0)
    query_s: float = setting(20.0, "seconds for a client's answer to a question", gt=0)
    offer_s: float = setting(
        5.0,
        "seconds that a client waits for other edges' offers in an edge round; once "
        "one has waited in vain, its edge lets no other client wait in that round",
        gt=0,
    )
    round_s: float = setting(600.0, "seconds for a client's training reply", gt=0)
    straggler_s: float = setting(
        30.0, "seconds for the other clients once schedule.quorum of a round have replied", gt=0
    )
    upload_stall_s: float = setting(20.0, "seconds of an upload without any progress", gt=0)
    interval_s: float = setting(7200.0, "seconds for an edge's reply for an interval", gt=0)
    retry_s: float = setting(
        60.0,
        "seconds before a client that failed is asked again; in reproducible mode at once",
        gt=0,
    )

    @model_validator(mode="after")
    def _answers_outlast_offers(self) -> Self:
        if self.offer_s >= self.query_s:
            raise ValueError(
                f"offer_s = {self.offer_s:g} is not below query_s = {self.query_s:g}: a client that"
                " waits for an edge's offer would answer too late; lower offer_s or raise query_s"
            )
        return self
