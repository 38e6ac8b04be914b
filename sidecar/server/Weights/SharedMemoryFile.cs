using Microsoft.Win32.SafeHandles;
using Rollout.Engine;

namespace Rollout.Server.Weights;

/// <summary>
/// Opens a payload that a client has written to shared memory. The path is untrusted, so it must be that of a regular file under
/// /dev/shm.
/// </summary>
internal sealed class SharedMemoryFile : IDisposable
{
    private const string Root = "/dev/shm";

    private SharedMemoryFile(string path, SafeFileHandle handle)
    {
        Path = path;
        Handle = handle;
    }

    public string Path { get; }

    public SafeFileHandle Handle { get; }

    /// <summary>Opens the file for reading.</summary>
    /// <exception cref="UpdateFailedException">The path or the file is refused; the message says why.</exception>
    public static SharedMemoryFile Open(string path)
    {
        // Checked before opening, because opening a pipe or a device may have side effects.
        FileInfo file = new(Check(path));
        if (!file.Exists) throw Refused(path, "there is no such file");
        if (file.LinkTarget is not null) throw Refused(path, "it is a symbolic link");
        if (file.Length == 0) throw Refused(path, "it has 0 bytes, too few for any payload"); // as a pipe has
        SafeFileHandle handle;
        try
        {
            handle = File.OpenHandle(path, FileMode.Open, FileAccess.Read, FileShare.ReadWrite | FileShare.Delete);
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            throw Refused(path, e.Message);
        }

        try
        {
            // Checked after opening, in case the path was replaced in between.
            string? opened = new FileInfo($"/proc/self/fd/{handle.DangerousGetHandle()}").LinkTarget;
            if (opened?.StartsWith(Root + "/", StringComparison.Ordinal) != true) throw Refused(path, $"it leads to {opened}");
            _ = RandomAccess.GetLength(handle); // fails unless it is a regular file
            return new SharedMemoryFile(path, handle);
        }
        catch (NotSupportedException)
        {
            handle.Dispose();
            throw Refused(path, "it is not a regular file");
        }
        catch
        {
            handle.Dispose();
            throw;
        }
    }

    /// <exception cref="UpdateFailedException">The file ends before that.</exception>
    public void ThrowUnlessHolding(ulong offset, long bytes)
    {
        long length = RandomAccess.GetLength(Handle);
        if (offset <= (ulong)length && (ulong)bytes <= (ulong)length - offset) return;
        throw Refused(Path, $"it has {length} bytes, too few for a payload of {bytes} at offset {offset}");
    }

    public void Dispose() => Handle.Dispose();

    private static string Check(string path)
    {
        if (path.Length == 0) throw Refused(path, "no path was given");
        if (path.Contains('\0')) throw Refused(path.Replace('\0', '?'), "it contains a null character");
        if (!path.StartsWith(Root + "/", StringComparison.Ordinal) || path.Length == Root.Length + 1)
            throw Refused(path, $"it must lie in {Root}");
        if (System.IO.Path.GetFullPath(path) != path) throw Refused(path, "it must be written without '.', '..' or doubled slashes");
        if (Directory.Exists(path)) throw Refused(path, "it is a directory");
        for (string parent = System.IO.Path.GetDirectoryName(path)!; parent.Length > Root.Length;
            parent = System.IO.Path.GetDirectoryName(parent)!)
        {
            if (new DirectoryInfo(parent).LinkTarget is not null) throw Refused(path, $"{parent} is a symbolic link");
        }

        return path;
    }

    private static UpdateFailedException Refused(string path, string reason)
        => new(UpdateFailure.Source, $"shared memory '{path}' refused: {reason}");
}
