"""The first tables."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "v0001"
down_revision = None
branch_labels = None
depends_on = None

SEQUENCE = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
JSON = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql")


def upgrade() -> None:
    op.create_table(
        "adapters",
        sa.Column("seq", SEQUENCE, autoincrement=True, nullable=False),
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("project_id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("base_id", sa.Text(), nullable=False),
        sa.Column("base_digest", sa.Text(), nullable=True),
        sa.Column("method", sa.Text(), nullable=False),
        sa.Column("job_id", sa.Text(), nullable=False),
        sa.Column("location", sa.Text(), nullable=False),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("manifest", JSON, nullable=False),
        sa.Column("metrics", JSON, nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("deleted_at", sa.Float(), nullable=True),
        sa.CheckConstraint("bytes >= 0", name=op.f("ck_adapters_bytes")),
        sa.CheckConstraint("length(name) BETWEEN 1 AND 64", name=op.f("ck_adapters_name")),
        sa.CheckConstraint("version >= 1", name=op.f("ck_adapters_version")),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_adapters")),
        sa.UniqueConstraint("id", name=op.f("uq_adapters_id")),
        sa.UniqueConstraint("job_id", name=op.f("uq_adapters_job_id")),
        sa.UniqueConstraint(
            "project_id", "name", "version", name=op.f("uq_adapters_project_id_name_version")
        ),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_adapters_base", "adapters", ["project_id", "base_id", "seq"], unique=False)
    op.create_index("ix_adapters_page", "adapters", ["project_id", "seq"], unique=False)

    op.create_table(
        "base_models",
        sa.Column("seq", SEQUENCE, autoincrement=True, nullable=False),
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("uri", sa.Text(), nullable=False),
        sa.Column("revision", sa.Text(), nullable=True),
        sa.Column("digest", sa.Text(), nullable=True),
        sa.Column("shape", JSON, nullable=False),
        sa.Column("info", JSON, nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.CheckConstraint("length(id) BETWEEN 1 AND 256", name=op.f("ck_base_models_id")),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_base_models")),
        sa.UniqueConstraint("id", name=op.f("uq_base_models_id")),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "capacity",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("snapshot", JSON, nullable=False),
        sa.Column("updated_at", sa.Float(), nullable=False),
        sa.CheckConstraint("id = 1", name=op.f("ck_capacity_one_row")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_capacity")),
    )
    op.create_table(
        "projects",
        sa.Column("seq", SEQUENCE, autoincrement=True, nullable=False),
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.CheckConstraint("length(id) BETWEEN 1 AND 64", name=op.f("ck_projects_id")),
        sa.CheckConstraint("length(name) BETWEEN 1 AND 64", name=op.f("ck_projects_name")),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_projects")),
        sa.UniqueConstraint("id", name=op.f("uq_projects_id")),
        sa.UniqueConstraint("name", name=op.f("uq_projects_name")),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "api_keys",
        sa.Column("seq", SEQUENCE, autoincrement=True, nullable=False),
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("project_id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("hash", sa.Text(), nullable=False),
        sa.Column("prefix", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("expires_at", sa.Float(), nullable=True),
        sa.Column("revoked_at", sa.Float(), nullable=True),
        sa.CheckConstraint("length(hash) = 64", name=op.f("ck_api_keys_hash")),
        sa.CheckConstraint("length(name) <= 64", name=op.f("ck_api_keys_name")),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_api_keys_project_id")),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_api_keys")),
        sa.UniqueConstraint("hash", name=op.f("uq_api_keys_hash")),
        sa.UniqueConstraint("id", name=op.f("uq_api_keys_id")),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_api_keys_page", "api_keys", ["project_id", "seq"], unique=False)

    op.create_table(
        "files",
        sa.Column("seq", SEQUENCE, autoincrement=True, nullable=False),
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("project_id", sa.Text(), nullable=False),
        sa.Column("filename", sa.Text(), nullable=False),
        sa.Column("purpose", sa.Text(), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("expires_at", sa.Float(), nullable=True),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("format", sa.Text(), nullable=True),
        sa.Column("rows", sa.BigInteger(), nullable=True),
        sa.Column("report", JSON, nullable=True),
        sa.Column("deleted_at", sa.Float(), nullable=True),
        sa.CheckConstraint("status IN ('uploaded', 'processed', 'error')", name=op.f("ck_files_status")),
        sa.CheckConstraint("bytes >= 0", name=op.f("ck_files_bytes")),
        sa.CheckConstraint("length(filename) <= 1024", name=op.f("ck_files_filename")),
        sa.CheckConstraint("length(sha256) = 64", name=op.f("ck_files_sha256")),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_files_project_id")),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_files")),
        sa.UniqueConstraint("id", name=op.f("uq_files_id")),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_files_expiry", "files", ["expires_at"], unique=False)
    op.create_index("ix_files_page", "files", ["project_id", "seq"], unique=False)

    op.create_table(
        "jobs",
        sa.Column("seq", SEQUENCE, autoincrement=True, nullable=False),
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("project_id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("spec", JSON, nullable=False),
        sa.Column("request", JSON, nullable=False),
        sa.Column("plan", JSON, nullable=True),
        sa.Column("attempt", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("live_attempt", sa.Integer(), nullable=True),
        sa.Column("live_since", sa.Float(), nullable=True),
        sa.Column("launched_at", sa.Float(), nullable=True),
        sa.Column("stopping_since", sa.Float(), nullable=True),
        sa.Column("lease_owner", sa.Text(), nullable=True),
        sa.Column("lease_token", sa.Text(), nullable=True),
        sa.Column("lease_expires_at", sa.Float(), nullable=True),
        sa.Column("metrics_part", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("failures", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("not_before", sa.Float(), nullable=True),
        sa.Column("phase", sa.Text(), nullable=True),
        sa.Column("status_reason", sa.Text(), nullable=True),
        sa.Column("progress", JSON, nullable=True),
        sa.Column("error", JSON, nullable=True),
        sa.Column("fine_tuned_model", sa.Text(), nullable=True),
        sa.Column("adapter_id", sa.Text(), nullable=True),
        sa.Column("adapter_version", sa.Integer(), nullable=True),
        sa.Column("result_files", JSON, nullable=False),
        sa.Column("trained_tokens", sa.BigInteger(), nullable=True),
        sa.Column("body_hash", sa.Text(), nullable=False),
        sa.Column("idempotency_key", sa.Text(), nullable=True),
        sa.Column("retry_count", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("started_at", sa.Float(), nullable=True),
        sa.Column("finished_at", sa.Float(), nullable=True),
        sa.CheckConstraint(
            "(finished_at IS NOT NULL) = (state IN ('succeeded', 'failed', 'cancelled'))",
            name=op.f("ck_jobs_finished"),
        ),
        sa.CheckConstraint("(state = 'running') = (lease_token IS NOT NULL)", name=op.f("ck_jobs_lease")),
        sa.CheckConstraint("state <> 'failed' OR error IS NOT NULL", name=op.f("ck_jobs_failed_has_error")),
        sa.CheckConstraint(
            "state <> 'running' OR (live_attempt IS NOT NULL AND live_attempt = attempt)",
            name=op.f("ck_jobs_running_is_live"),
        ),
        sa.CheckConstraint(
            "state <> 'succeeded' OR adapter_id IS NOT NULL", name=op.f("ck_jobs_succeeded_has_adapter")
        ),
        sa.CheckConstraint(
            "state IN ('validating_files', 'queued', 'running', 'paused', 'succeeded', 'failed', 'cancelled')",  # noqa: E501
            name=op.f("ck_jobs_state"),
        ),
        sa.CheckConstraint(
            "(lease_token IS NULL) = (lease_expires_at IS NULL)", name=op.f("ck_jobs_lease_expires_at")
        ),
        sa.CheckConstraint("(lease_token IS NULL) = (lease_owner IS NULL)", name=op.f("ck_jobs_lease_owner")),
        sa.CheckConstraint("adapter_version >= 1", name=op.f("ck_jobs_adapter_version")),
        sa.CheckConstraint("attempt >= 0", name=op.f("ck_jobs_attempt")),
        sa.CheckConstraint("failures >= 0", name=op.f("ck_jobs_failures")),
        sa.CheckConstraint("length(body_hash) BETWEEN 1 AND 64", name=op.f("ck_jobs_body_hash")),
        sa.CheckConstraint("length(idempotency_key) BETWEEN 1 AND 255", name=op.f("ck_jobs_idempotency_key")),
        sa.CheckConstraint("length(name) BETWEEN 1 AND 64", name=op.f("ck_jobs_name")),
        sa.CheckConstraint("length(status_reason) <= 2000", name=op.f("ck_jobs_status_reason")),
        sa.CheckConstraint("live_attempt BETWEEN 1 AND attempt", name=op.f("ck_jobs_live_attempt")),
        sa.CheckConstraint("priority BETWEEN 0 AND 100", name=op.f("ck_jobs_priority")),
        sa.CheckConstraint("retry_count >= 0", name=op.f("ck_jobs_retry_count")),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_jobs_project_id")),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_jobs")),
        sa.UniqueConstraint("id", name=op.f("uq_jobs_id")),
        sa.UniqueConstraint("project_id", "idempotency_key", name=op.f("uq_jobs_project_id_idempotency_key")),
        sa.UniqueConstraint(
            "project_id", "name", "adapter_version", name=op.f("uq_jobs_project_id_name_adapter_version")
        ),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_jobs_body", "jobs", ["project_id", "body_hash", "seq"], unique=False)
    op.create_index(
        "ix_jobs_lease",
        "jobs",
        ["lease_expires_at"],
        unique=False,
        sqlite_where=sa.text("state = 'running'"),
        postgresql_where=sa.text("state = 'running'"),
    )
    op.create_index(
        "ix_jobs_live",
        "jobs",
        ["seq"],
        unique=False,
        sqlite_where=sa.text("live_attempt IS NOT NULL"),
        postgresql_where=sa.text("live_attempt IS NOT NULL"),
    )
    op.create_index("ix_jobs_page", "jobs", ["project_id", "seq"], unique=False)
    op.create_index(
        "ix_jobs_waiting",
        "jobs",
        [sa.literal_column("priority DESC"), "seq"],
        unique=False,
        sqlite_where=sa.text("state = 'queued'"),
        postgresql_where=sa.text("state = 'queued'"),
    )

    op.create_table(
        "checkpoints",
        sa.Column("seq", SEQUENCE, autoincrement=True, nullable=False),
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("job_id", sa.Text(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("step", sa.Integer(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("metrics", JSON, nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.CheckConstraint("attempt >= 1", name=op.f("ck_checkpoints_attempt")),
        sa.CheckConstraint("step >= 0", name=op.f("ck_checkpoints_step")),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_checkpoints_job_id")),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_checkpoints")),
        sa.UniqueConstraint("id", name=op.f("uq_checkpoints_id")),
        sa.UniqueConstraint("job_id", "step", name=op.f("uq_checkpoints_job_id_step")),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_checkpoints_page", "checkpoints", ["job_id", "seq"], unique=False)

    op.create_table(
        "job_events",
        sa.Column("seq", SEQUENCE, autoincrement=True, nullable=False),
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("job_id", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("level", sa.Text(), nullable=False),
        sa.Column("type", sa.Text(), nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("data", JSON, nullable=True),
        sa.Column("dedupe", sa.Text(), nullable=True),
        sa.CheckConstraint("level IN ('info', 'warn', 'error')", name=op.f("ck_job_events_level")),
        sa.CheckConstraint("type IN ('message', 'metrics')", name=op.f("ck_job_events_type")),
        sa.CheckConstraint("length(message) <= 4000", name=op.f("ck_job_events_message")),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_job_events_job_id")),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_job_events")),
        sa.UniqueConstraint("id", name=op.f("uq_job_events_id")),
        sa.UniqueConstraint("job_id", "dedupe", name=op.f("uq_job_events_job_id_dedupe")),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_job_events_page", "job_events", ["job_id", "seq"], unique=False)

    op.create_table(
        "job_metadata",
        sa.Column("job_id", sa.Text(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("value", sa.Text(), nullable=False),
        sa.CheckConstraint("length(key) BETWEEN 1 AND 64", name=op.f("ck_job_metadata_key")),
        sa.CheckConstraint("length(value) <= 512", name=op.f("ck_job_metadata_value")),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_job_metadata_job_id")),
        sa.PrimaryKeyConstraint("job_id", "key", name=op.f("pk_job_metadata")),
    )
    op.create_index("ix_job_metadata_value", "job_metadata", ["key", "value", "job_id"], unique=False)

    op.create_table(
        "uploads",
        sa.Column("seq", SEQUENCE, autoincrement=True, nullable=False),
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("project_id", sa.Text(), nullable=False),
        sa.Column("filename", sa.Text(), nullable=False),
        sa.Column("mime_type", sa.Text(), nullable=False),
        sa.Column("purpose", sa.Text(), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("expires_at", sa.Float(), nullable=False),
        sa.Column("file_expires_after", sa.Float(), nullable=True),
        sa.Column("file_id", sa.Text(), nullable=True),
        sa.CheckConstraint(
            "status IN ('pending', 'completed', 'cancelled', 'expired')", name=op.f("ck_uploads_status")
        ),
        sa.CheckConstraint("bytes >= 0", name=op.f("ck_uploads_bytes")),
        sa.CheckConstraint("length(filename) <= 1024", name=op.f("ck_uploads_filename")),
        sa.ForeignKeyConstraint(["file_id"], ["files.id"], name=op.f("fk_uploads_file_id")),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_uploads_project_id")),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_uploads")),
        sa.UniqueConstraint("id", name=op.f("uq_uploads_id")),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_uploads_expiry", "uploads", ["status", "expires_at"], unique=False)
    op.create_index("ix_uploads_page", "uploads", ["project_id", "seq"], unique=False)

    op.create_table(
        "upload_parts",
        sa.Column("seq", SEQUENCE, autoincrement=True, nullable=False),
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("upload_id", sa.Text(), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.CheckConstraint("bytes >= 0", name=op.f("ck_upload_parts_bytes")),
        sa.CheckConstraint("length(sha256) = 64", name=op.f("ck_upload_parts_sha256")),
        sa.ForeignKeyConstraint(["upload_id"], ["uploads.id"], name=op.f("fk_upload_parts_upload_id")),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_upload_parts")),
        sa.UniqueConstraint("id", name=op.f("uq_upload_parts_id")),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_upload_parts_page", "upload_parts", ["upload_id", "seq"], unique=False)
