"""Networks, devices and deployments that several tests share."""
