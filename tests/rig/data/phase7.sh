# The guide's tests 1 to 4 (phase 7), one after the other; prints name=value lines.
C1=http://hcna-c1.local:8080
now() { date +%s.%N; }
since() { awk -v a="$1" -v b="$(now)" 'BEGIN { printf "%.2f", b - a }'; }
field() { python3 -c 'import json, sys; print(json.load(sys.stdin)[sys.argv[1]])' "$1"; }
total() { curl -s http://hcna-m1.local:8443/metrics | awk '/^tasks_completed_total/ { n += $2 } END { print n + 0 }'; }

echo "test1=$(curl -s -X POST http://hcna-m1.local:8443/admin/send-intent -H 'Content-Type: application/json' \
  -d '{"dst": "HCNA-W1--prod--home--v1.0", "intent": "test.ping", "payload": {}}')"

TASK_ID=$(curl -s -X POST $C1/tasks -H 'Content-Type: application/json' \
  -d '{"task_type": "echo", "payload": {"msg": "test"}}' | field task_id)
while [ "$(curl -s $C1/tasks/$TASK_ID | field status)" != completed ]; do sleep 0.2; done
echo "test2=$(curl -s $C1/tasks/$TASK_ID | python3 -c 'import json, sys; print(json.dumps(json.load(sys.stdin)["result"]))')"

echo "test3_total_before=$(total)"
start=$(now)
mkdir -p /tmp/test3
for i in {1..100}; do
  curl -s -o /tmp/test3/$i -X POST $C1/tasks -H 'Content-Type: application/json' \
    -d "{\"task_type\": \"echo\", \"payload\": {\"id\": $i}}" &
done
wait
completed=0
for i in {1..100}; do
  id=$(field task_id </tmp/test3/$i)
  [ "$(curl -s "$C1/tasks/$id?wait=30" | field status)" = completed ] && completed=$((completed + 1))
done
echo "test3_s=$(since $start)"
echo "test3_completed=$completed"
echo "test3_total_after=$(total)"

start=$(now)
TASK_ID=$(curl -s -X POST $C1/tasks -H 'Content-Type: application/json' \
  -d '{"task_type": "echo", "payload": {}}' | field task_id)
while [ "$(curl -s $C1/tasks/$TASK_ID | field status)" != completed ]; do sleep 0.1; done
echo "test4_s=$(since $start)"
