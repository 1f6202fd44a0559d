"""Alembic's entry point. `cxrbatch db …` (cxrbatch/store/migrate.py) opens the store and passes its connection.

There is no alembic.ini: the URL comes from the settings.
"""

from alembic import context

from cxrbatch.store.schema import metadata

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=metadata)
# The caller owns the transaction: either all steps of one command are committed or none.
context.run_migrations()
