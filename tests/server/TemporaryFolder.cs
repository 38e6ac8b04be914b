namespace Rollout.Server.Tests;

/// <summary>A new temporary folder, deleted after the test.</summary>
internal sealed class TemporaryFolder(string? prefix = null) : IDisposable
{
    public string Path { get; } = prefix is null
        ? Directory.CreateTempSubdirectory("rs-").FullName
        : Directory.CreateDirectory($"{prefix}{Guid.NewGuid():N}").FullName;

    public string this[string name] => System.IO.Path.Combine(Path, name);

    public void Dispose() => Directory.Delete(Path, recursive: true);
}
