"""Taking jobs from RQ's queue and ending them, a batch at a time: what consumers.worker is made of."""
