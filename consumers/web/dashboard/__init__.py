"""RQ Dashboard as a server of its own: rq-dashboard's views and pages, behind a login, in a process without pickle."""
