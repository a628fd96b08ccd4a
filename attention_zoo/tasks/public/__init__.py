"""Published data sets from a local path: nothing is downloaded, unless the path is `hf:NAME`, a copy on the hub.

| task= | task.path is | made by |
|---|---|---|
| enwik8, text8 | the file, its .zip, or a folder with one of them | `enwik8.py`, `text8.py` |
| wikitext103 | the folder with wiki.{train,valid,test}.tokens or .raw | `wikitext103.py` |
| pg19 | the folder with train/, validation/, test/ | `pg19.py` |
| lra_listops | the folder with basic_{train,val,test}.tsv | `lra_listops.py` |
| lra_text | the folder aclImdb | `lra_text.py` |
| lra_retrieval | the folder with new_aan_pairs.{train,eval,test}.tsv | `lra_retrieval.py` |
| lra_image | the folder cifar-10-batches-bin | `lra_image.py` |
| lra_pathfinder32, lra_pathx | the folder pathfinder32, pathfinder128 | `lra_pathfinder.py` |
| text | any other file or folder, of any bytes: no form is asked for | `tasks/text.py` |

Each says where its data are to be had when they are not there, names the file, the line and the rule when a format is
not kept, and describes what it read by sizes and SHA-256. Splits are the published ones. A copy on the hub has to hold
files of these same forms (many hold parquet, which is not read); `hf:NAME@REVISION` pins it. Take
`pip install 'attention-zoo[data]'` for the hub and for images.
"""
