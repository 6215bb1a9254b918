curl http://hcna-c1.local:8080/health
