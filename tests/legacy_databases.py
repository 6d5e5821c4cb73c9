"""SQL that makes databases of the old controller, as they exist in practice."""

from __future__ import annotations

FIRST_GENERATION = """
    CREATE TABLE portfolio_history (id serial PRIMARY KEY, snapshot_date date NOT NULL, timestamp timestamp NOT NULL,
        balance decimal(15,2) NOT NULL, total_invested decimal(15,2) NOT NULL, total_profit_loss decimal(15,2) NOT NULL,
        total_value decimal(15,2) NOT NULL, open_positions integer NOT NULL, trade_count integer NOT NULL,
        created_at timestamp NOT NULL DEFAULT now());
    CREATE INDEX idx_portfolio_history_date ON portfolio_history (snapshot_date DESC);
    CREATE TABLE signal_archives (id serial PRIMARY KEY, archived_at timestamp NOT NULL,
        archive_month varchar(7) NOT NULL, signals_count integer NOT NULL, signals_data jsonb NOT NULL,
        created_at timestamp NOT NULL DEFAULT now());
    CREATE INDEX idx_signal_archives_month ON signal_archives (archive_month);
"""
# event_outcomes of an earlier release of this project, in which the outcome `duplicate` had another name.
OUTCOMES_BEFORE_DUPLICATE = """
    DROP TABLE event_outcomes;
    CREATE TABLE event_outcomes (
        job_id text NOT NULL,
        source text,
        sequence bigint,
        event_id uuid,
        outcome text NOT NULL,
        reason text,
        event text,
        created_at timestamptz NOT NULL DEFAULT now(),
        CONSTRAINT event_outcomes_pk PRIMARY KEY (job_id),
        CONSTRAINT event_outcomes_outcome_is_known CHECK (outcome IN ('absorbed', 'rejected', 'discarded')),
        CONSTRAINT event_outcomes_refusal_has_a_reason CHECK (outcome = 'absorbed' OR reason IS NOT NULL));
    CREATE INDEX event_outcomes_of_source ON event_outcomes (source, sequence);
    CREATE INDEX event_outcomes_rejected ON event_outcomes (created_at DESC) WHERE outcome = 'rejected';
"""
SECOND_GENERATION = """
    CREATE TABLE portfolios (portfolio_id integer PRIMARY KEY);
    CREATE TABLE portfolio_history (id serial PRIMARY KEY,
        portfolio_id integer NOT NULL REFERENCES portfolios (portfolio_id) ON DELETE CASCADE,
        snapshot_date date NOT NULL, timestamp timestamp NOT NULL, balance decimal(15,2) NOT NULL,
        total_invested decimal(15,2) NOT NULL, total_profit_loss decimal(15,2) NOT NULL,
        total_value decimal(15,2) NOT NULL, open_positions integer DEFAULT 0, trade_count integer DEFAULT 0,
        UNIQUE (portfolio_id, snapshot_date));
"""

# Each makes :rows rows. Amounts have cents and both signs. Times have microseconds; two of them are in the hour that
# clocks in Berlin show twice.
FIRST_GENERATION_SNAPSHOTS = """
    INSERT INTO portfolio_history (snapshot_date, timestamp, balance, total_invested, total_profit_loss, total_value,
        open_positions, trade_count, created_at)
    SELECT CAST(at AS date), at, 9900 - number / 100.0, number % 500, (number % 2001 - 1000) / 100.0,
        9900 - number / 100.0 + (number % 2001 - 1000) / 100.0, number % 7, number, at
    FROM generate_series(1, CAST(:rows AS integer)) AS number,
        LATERAL (SELECT timestamp '2025-10-26 02:29:58.101234' + number * interval '61.000001 seconds' AS at) AS moment
"""
SECOND_GENERATION_SNAPSHOTS = """
    INSERT INTO portfolios SELECT generate_series(1, 3);
    INSERT INTO portfolio_history (portfolio_id, snapshot_date, timestamp, balance, total_invested, total_profit_loss,
        total_value, open_positions, trade_count)
    SELECT 1 + number % 3, date '2025-10-20' + number,
        timestamp '2025-10-20 17:02:46.101234' + number * interval '1 day',
        number, 1, -0.01, number - 0.01, nullif(number % 3, 0), nullif(number % 4, 0)
    FROM generate_series(1, CAST(:rows AS integer)) AS number
"""
ARCHIVES = """
    INSERT INTO signal_archives (archived_at, archive_month, signals_count, signals_data, created_at)
    SELECT at, to_char(at, 'YYYY-MM'), 2, CAST('[{"market_id": "510372", "yes_price": 0.99950000000000000001,
        "market_question": "Öffnet die Brücke? 🌉",
        "amount": ' || number || '}, {"big": 1e300, "id": null}]' AS jsonb), at
    FROM generate_series(1, CAST(:rows AS integer)) AS number,
        LATERAL (SELECT timestamp '2025-10-31 23:59:58.000001' + number * interval '1 second' AS at) AS moment
"""
# Tables beside the old ones, which must not change.
OTHER_TABLES = """
    CREATE TABLE markets (market_id text PRIMARY KEY, question text NOT NULL);
    CREATE TABLE trades (id serial PRIMARY KEY, market_id text REFERENCES markets, at timestamp NOT NULL);
    CREATE INDEX idx_trades_at ON trades (at);
    CREATE VIEW open_trades AS SELECT * FROM trades;
    INSERT INTO markets VALUES ('510372', 'Öffnet die Brücke?');
    INSERT INTO trades (market_id, at) VALUES ('510372', '2025-10-20');
"""
