"""What each rank computes, sends and receives for one attention.  Plain data for any number of ranks, no process."""
