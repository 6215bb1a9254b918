curl -X POST http://localhost:8443/admin/send-intent \
  -H "Content-Type: application/json" \
  -d '{
    "dst": "HCNA-W1--prod--home--v1.0",
    "intent": "test.ping",
    "payload": {}
  }'
journalctl -u hcna-w1 -n 10 | grep "test.ping"
