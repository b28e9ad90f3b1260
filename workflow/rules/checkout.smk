# Where the workflow's files lie, also when another Snakefile imports it as a module: from a folder, or from a repository at a tag.

import tarfile
import tempfile
from pathlib import Path


def checkout(basedir):
    """Folder of the workflow, whose rules lie in ``basedir`` (a source file of Snakemake).

    From ``github(...)`` or ``gitlab(...)`` Snakemake reads the rules alone. The scripts come with them: that commit is unpacked below ``.snakemake``.
    """
    place = basedir.get_path_or_uri(secret_free=True)
    if os.path.isdir(place):
        return os.path.normpath(os.path.join(place, "..", ".."))
    repository = basedir.hosted_repo.repo
    commit = repository.commit(basedir.ref).hexsha
    folder = Path(".snakemake", "quantgrid", commit)
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary, tempfile.TemporaryFile() as packed:
            repository.archive(packed, commit)
            packed.seek(0)
            with tarfile.open(fileobj=packed) as archive:
                archive.extractall(Path(temporary, commit), filter="data")
            os.replace(Path(temporary, commit), folder)
    return str(folder.resolve())
