using System.Text;

namespace Rollout.Engine.Tests;

/// <summary>A new temporary folder, deleted after the test.</summary>
internal sealed class TemporaryFolder : IDisposable
{
    public string Path { get; } = Directory.CreateTempSubdirectory("rollout-").FullName;

    public string this[string name] => System.IO.Path.Combine(Path, name);

    public string Write(string name, string text) => Write(name, Encoding.UTF8.GetBytes(text));

    public string Write(string name, byte[] bytes)
    {
        File.WriteAllBytes(this[name], bytes);
        return this[name];
    }

    /// <summary>The files of this folder that the process has open, deleted ones too.</summary>
    public IReadOnlyList<string> OpenFiles =>
        [.. Directory.GetFiles("/proc/self/fd").Select(file => new FileInfo(file).LinkTarget).OfType<string>()
            .Where(target => target.StartsWith(Path + "/", StringComparison.Ordinal)).Order()];

    public void Dispose() => Directory.Delete(Path, recursive: true);
}
