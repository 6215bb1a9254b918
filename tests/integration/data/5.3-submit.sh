curl -X POST http://hcna-c1.local:8080/tasks \
  -H "Content-Type: application/json" \
  -d '{
    "task_type": "echo",
    "payload": {"message": "Hello, HCNA-3!"}
  }'
