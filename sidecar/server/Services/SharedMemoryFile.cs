using Microsoft.Win32.SafeHandles;
using Rollout.Engine;

namespace Rollout.Server.Services;

/// <summary>
/// Opens a payload a client left in shared memory. The path comes from outside, so it may name nothing but a regular file under
/// /dev/shm, whatever it looks like.
/// </summary>
internal static class SharedMemoryFile
{
    private const string Root = "/dev/shm";

    /// <summary>Opens the file for reading and makes sure that it holds the payload.</summary>
    /// <exception cref="UpdateFailedException">Says what is wrong with the path or the file.</exception>
    public static SafeFileHandle Open(string path, ulong offset, long payloadBytes)
    {
        // Before opening: opening a pipe or a device may itself do something.
        FileInfo file = new(Check(path));
        if (!file.Exists) throw Refused(path, "there is no such file");
        if (file.LinkTarget is not null) throw Refused(path, "it is a symbolic link");
        if ((file.Attributes & FileAttributes.Device) != 0) throw Refused(path, "it is not a regular file");
        CheckSize(path, file.Length, offset, payloadBytes);

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
            // After opening: what was opened is what counts, should the path have been exchanged in between.
            string? opened = new FileInfo($"/proc/self/fd/{handle.DangerousGetHandle()}").LinkTarget;
            if (opened?.StartsWith(Root + "/", StringComparison.Ordinal) != true) throw Refused(path, $"it leads to {opened}");
            CheckSize(path, RandomAccess.GetLength(handle), offset, payloadBytes);
            return handle;
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

    private static string Check(string path)
    {
        if (path.Length == 0) throw Refused(path, "no path was given");
        if (path.Contains('\0')) throw Refused(path.Replace('\0', '?'), "it contains a null character");
        if (!path.StartsWith(Root + "/", StringComparison.Ordinal) || path.Length == Root.Length + 1)
            throw Refused(path, $"it must lie in {Root}");
        if (Path.GetFullPath(path) != path) throw Refused(path, "it must be written without '.', '..' or doubled slashes");
        if (Directory.Exists(path)) throw Refused(path, "it is a directory");
        for (string parent = Path.GetDirectoryName(path)!; parent.Length > Root.Length; parent = Path.GetDirectoryName(parent)!)
        {
            if (new DirectoryInfo(parent).LinkTarget is not null) throw Refused(path, $"{parent} is a symbolic link");
        }

        return path;
    }

    private static void CheckSize(string path, long length, ulong offset, long payloadBytes)
    {
        if (offset <= (ulong)length && (ulong)payloadBytes <= (ulong)length - offset) return;
        throw Refused(path, $"it has {length} bytes, too few for a payload of {payloadBytes} at offset {offset}");
    }

    private static UpdateFailedException Refused(string path, string reason) => new($"shared memory '{path}' refused: {reason}");
}
