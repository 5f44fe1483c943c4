"""How Alembic reaches the database: through the open transaction that `jobs.db.migrate` hands over."""

from alembic import context

from jobs.db import METADATA

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=METADATA,
    # SQLite cannot alter a constraint: batch mode copies the table instead.
    render_as_batch=True,
)
context.run_migrations()
