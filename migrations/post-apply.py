"""After the migrations: the code in sql/, always the one that ships with them."""

from yoyo import step

from level_sync.setup.install import load_code

steps = [step(load_code)]
