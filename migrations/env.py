"""Alembic's entry. `cxrbatch db …` (cxrbatch/store/migrate.py) opens the store and hands its connection over.

There is no alembic.ini: the URL comes from the settings, as everywhere else.
"""

from alembic import context

from cxrbatch.store.schema import metadata

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=metadata)
# The caller owns the transaction: all steps of one command are kept or none.
context.run_migrations()
