"""What a site, a packet, a release and a subscriber cost, and what that makes of a large federation."""
