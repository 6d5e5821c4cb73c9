"""RQ Dashboard as a server process: rq-dashboard's views and pages behind a login, without pickle."""
