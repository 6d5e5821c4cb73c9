"""RQ Dashboard as a server of its own, for whoever looks after the queue.

Its pages and its script are those of rq-dashboard. What it reads from Redis and what it changes there is ours: JSON
only, whatever state a job is in, and behind a login.
"""
