using System.Runtime.InteropServices;
using System.Security.Cryptography;

namespace Rollout.Native;

/// <summary>
/// Memory that other processes of this user can open by a path and write, and that none of them can shrink or grow: the file behind it is
/// sealed (memfd_create(2)), so reading it here can never end in SIGBUS, whatever they do. It has no name in any folder and is freed when
/// the process ends, however that ends.
/// </summary>
public sealed unsafe partial class SealedMemory : SafeHandle
{
    private const uint CloseOnExec = 1;      // MFD_CLOEXEC
    private const uint AllowSealing = 2;     // MFD_ALLOW_SEALING
    private const int AddSeals = 1033;       // F_ADD_SEALS
    private const int Seals = 7;             // F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW
    private const int Read = 1;              // PROT_READ
    private const int Shared = 1;            // MAP_SHARED
    private static readonly nint s_mapFailed = -1;

    private readonly int _file;

    private SealedMemory(string name, int file, nint start, long bytes)
        : base(0, ownsHandle: true)
    {
        Name = name;
        _file = file;
        Bytes = bytes;
        SetHandle(start);
    }

    public long Bytes { get; }

    /// <summary>Unique: a process that opens the path can tell by it that it is in the same process namespace.</summary>
    public string Name { get; }

    /// <summary>A path that processes of the same user which see this one can open for reading and writing.</summary>
    public string Path => $"/proc/{Environment.ProcessId}/fd/{_file}";

    public override bool IsInvalid => handle == 0;

    /// <summary>Null where the system does not support it.</summary>
    /// <exception cref="OutOfMemoryException">The machine does not have enough address space.</exception>
    public static SealedMemory? TryCreate(long bytes)
    {
        ArgumentOutOfRangeException.ThrowIfLessThan(bytes, 1);
        if (!OperatingSystem.IsLinux())
            return null;
        string name = $"rollout-{Convert.ToHexStringLower(RandomNumberGenerator.GetBytes(8))}";
        int file = MemFdCreate(name, CloseOnExec | AllowSealing);
        if (file < 0)
            return null;
        if (Truncate(file, bytes) != 0 || Control(file, AddSeals, Seals) != 0)
        {
            _ = Close(file);
            return null;
        }

        nint start = Map(0, (nuint)bytes, Read, Shared, file, 0);
        if (start != s_mapFailed)
            return new SealedMemory(name, file, start, bytes);
        _ = Close(file);
        throw new OutOfMemoryException($"{bytes} bytes could not be mapped.");
    }

    /// <summary>The current contents. Other processes may write them meanwhile.</summary>
    public ReadOnlySpan<byte> Span(long offset, int length)
    {
        ObjectDisposedException.ThrowIf(IsClosed, this);
        ArgumentOutOfRangeException.ThrowIfNegative(offset);
        ArgumentOutOfRangeException.ThrowIfNegative(length);
        ArgumentOutOfRangeException.ThrowIfGreaterThan(offset, Bytes - length);
        return new ReadOnlySpan<byte>((byte*)handle + offset, length);
    }

    protected override bool ReleaseHandle() => (Unmap(handle, (nuint)Bytes) | Close(_file)) == 0;

    [LibraryImport("libc", EntryPoint = "memfd_create", StringMarshalling = StringMarshalling.Utf8)]
    private static partial int MemFdCreate(string name, uint flags);

    [LibraryImport("libc", EntryPoint = "ftruncate")]
    private static partial int Truncate(int file, long length);

    [LibraryImport("libc", EntryPoint = "fcntl")]
    private static partial int Control(int file, int command, int argument);

    [LibraryImport("libc", EntryPoint = "mmap")]
    private static partial nint Map(nint address, nuint length, int protection, int flags, int file, nint offset);

    [LibraryImport("libc", EntryPoint = "munmap")]
    private static partial int Unmap(nint address, nuint length);

    [LibraryImport("libc", EntryPoint = "close")]
    private static partial int Close(int file);
}
