"""Our own HTTP/1.1 to endpoints: connections, pools, proxies; `wire` is the one door to them."""
