using System.Runtime.InteropServices;
using System.Runtime.Intrinsics.X86;

namespace Rollout.Kernels;

/// <summary>
/// Functions assembled at start, for instructions that .NET 10 has no intrinsic for in 512 bits. One function for each number of rows of a
/// tile; each takes a pointer to its arguments in rdi.
/// </summary>
internal sealed unsafe partial class MachineCode : IDisposable
{
    private const int Line = 64;
    private const int ReadWrite = 3;         // PROT_READ | PROT_WRITE
    private const int ReadExecute = 5;       // PROT_READ | PROT_EXEC
    private const int PrivateAnonymous = 34; // MAP_PRIVATE | MAP_ANONYMOUS
    private static readonly nint s_mapFailed = -1;

    private readonly nint[] _functions;
    private readonly nuint _size;
    private nint _memory;

    /// <param name="tallest">Rows of the tallest tile.</param>
    /// <param name="assemble">Returns the code for a number of rows.</param>
    public MachineCode(int tallest, Func<int, byte[]> assemble)
    {
        byte[][] code = [.. Enumerable.Range(1, tallest).Select(assemble)];
        _size = (nuint)code.Sum(function => Aligned(function.Length));
        _memory = Map(0, _size, ReadWrite, PrivateAnonymous, -1, 0);
        if (_memory == s_mapFailed)
            throw new OutOfMemoryException($"{_size} bytes for machine code could not be mapped.");
        _functions = new nint[tallest + 1];
        nint at = _memory;
        for (int rows = 1; rows <= tallest; rows++)
        {
            _functions[rows] = at;
            Marshal.Copy(code[rows - 1], 0, at, code[rows - 1].Length);
            at += Aligned(code[rows - 1].Length);
        }

        if (Protect(_memory, _size, ReadExecute) != 0)
        {
            string reason = Marshal.GetPInvokeErrorMessage(Marshal.GetLastPInvokeError());
            Dispose();
            throw new InvalidOperationException($"This machine does not let a process make memory executable (mprotect: {reason}).");
        }
    }

    /// <summary>The system keeps AVX-512's registers, and the calling convention is the one assembled for.</summary>
    public static bool IsSupported { get; } = OperatingSystem.IsLinux() && X86Base.X64.IsSupported && Avx512F.IsSupported;

    public void Run(int rows, void* arguments) => ((delegate* unmanaged<void*, void>)_functions[rows])(arguments);

    public void Dispose()
    {
        if (_memory == 0)
            return;
        _ = Unmap(_memory, _size);
        _memory = 0;
    }

    private static int Aligned(int bytes) => (bytes + Line - 1) / Line * Line;

    [LibraryImport("libc", EntryPoint = "mmap")]
    private static partial nint Map(nint address, nuint length, int protection, int flags, int file, nint offset);

    [LibraryImport("libc", EntryPoint = "mprotect", SetLastError = true)]
    private static partial int Protect(nint address, nuint length, int protection);

    [LibraryImport("libc", EntryPoint = "munmap")]
    private static partial int Unmap(nint address, nuint length);
}
