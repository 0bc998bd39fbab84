"""A unique index on the pair of each table, where there is none; built beside live traffic."""

from yoyo import step

from level_sync.setup.install import drop_pair_indexes, make_pairs_unique

__depends__ = {"0006_comment_application_tables"}
__transactional__ = False

steps = [step(make_pairs_unique, drop_pair_indexes)]
