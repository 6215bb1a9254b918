curl -X POST http://hcna-c1.local:8080/tasks \
  -d '{
    "task_type": "qegg.generate",
    "payload": {
      "grid_level": 4,
      "output_formats": ["glb", "obj"]
    }
  }'
