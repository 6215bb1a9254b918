curl -X POST http://hcna-c1.local:8080/tasks \
  -d '{
    "task_type": "drgfc.compress",
    "payload": {
      "input_file": "/data/my_file.txt",
      "output_file": "/data/my_file.drgfc"
    }
  }'
