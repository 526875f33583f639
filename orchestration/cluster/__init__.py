"""The Ray cluster: finding and joining it, what it has room for, its versions, the doctor."""
