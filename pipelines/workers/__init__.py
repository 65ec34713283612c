"""Who computes under Ray: the cluster, pools of actors that map shards (Ray Data), gangs of training workers (Ray Train)."""
