time (TASK_ID=$(curl -s -X POST http://hcna-c1.local:8080/tasks \
  -H "Content-Type: application/json" \
  -d '{"task_type": "echo", "payload": {}}' \
  | jq -r '.task_id') && \
  while [ "$(curl -s http://hcna-c1.local:8080/tasks/$TASK_ID | jq -r '.status')" != "completed" ]; do sleep 0.1; done)
