"""From a composed config to a started job: plan it, describe its run directory, start its workers."""
