TASK_ID=$(curl -X POST http://hcna-c1.local:8080/tasks \
  -H "Content-Type: application/json" \
  -d '{"task_type": "echo", "payload": {"msg": "test"}}' \
  | jq -r '.task_id')
while true; do
  STATUS=$(curl -s http://hcna-c1.local:8080/tasks/$TASK_ID | jq -r '.status')
  echo "Task $TASK_ID status: $STATUS"
  [ "$STATUS" = "completed" ] && break
  sleep 2
done
curl http://hcna-c1.local:8080/tasks/$TASK_ID | jq '.result'
