ssh hcna-admin@hcna-w1.local "sudo systemctl stop hcna-w1"
curl -X POST http://hcna-c1.local:8080/tasks \
  -d '{"task_type": "echo", "payload": {}}'
journalctl -u hcna-m1 -n 20
ssh hcna-admin@hcna-w1.local "sudo systemctl start hcna-w1"
