"""``Table.jobs``: the jobs table as users see it."""
