for i in {1..100}; do
  curl -X POST http://hcna-c1.local:8080/tasks \
    -H "Content-Type: application/json" \
    -d "{\"task_type\": \"echo\", \"payload\": {\"id\": $i}}" &
done
wait
curl http://hcna-m1.local:8443/metrics | grep 'tasks_completed_total'
