using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;

namespace Rollout.Kernels.Cuda;

/// <summary>
/// The launches of a step, noted until something has to be known. A list that has gone to the device before, to the last argument, goes as one graph:
/// steps that decode so many rows are all alike, because rows are rounded up to a bucket, indices lie in one place, and weights do not move. Who asks for
/// operations need not know.
/// </summary>
internal sealed unsafe class CudaCommands : IDisposable
{
    /// <summary>Two sets of weights in turn, for a score of row counts; then the oldest goes.</summary>
    private const int MostGraphs = 64;

    private readonly CudaDevice _device;
    private readonly CudaKernels _kernels;
    private readonly CudaMatMul _matMul;
    private readonly Dictionary<int, Recorded> _known = [];
    private Command[] _list = new Command[256];
    private int _count;
    private long _flushes;

    public CudaCommands(CudaDevice device, CudaKernels kernels, CudaMatMul matMul)
    {
        _device = device;
        _kernels = kernels;
        _matMul = matMul;
    }

    /// <summary>Lists that went as graphs.</summary>
    public long GraphLaunches { get; private set; }

    /// <summary>Notes a kernel. Arguments are as its source has them, in order.</summary>
    public void Launch(nint function, Grid grid, int threads, int sharedBytes, params ReadOnlySpan<Argument> arguments)
    {
        ref Command command = ref Next();
        command.Function = function;
        command.Grid = grid;
        command.Threads = threads;
        command.SharedBytes = sharedBytes;
        arguments.CopyTo(command.Arguments);
        command.Count = arguments.Length;
    }

    /// <summary>Notes a matmul; see <see cref="CudaMatMul.Multiply"/>.</summary>
    public void Multiply(nuint input, nuint weight, nuint bias, nuint output, int rows, int outputs, int inputs, MatMulOutput kind)
    {
        ref Command command = ref Next();
        command.Function = 0;
        ReadOnlySpan<Argument> arguments = [input, weight, bias, output, rows, outputs, inputs, (int)kind];
        arguments.CopyTo(command.Arguments);
        command.Count = arguments.Length;
    }

    /// <summary>Queues all that was noted.</summary>
    public void Flush()
    {
        if (_count == 0)
            return;
        _device.MakeCurrent();
        if (_device.Times is not null)
        {
            Run();
            Empty();
            return;
        }

        ReadOnlySpan<byte> list = MemoryMarshal.AsBytes(_list.AsSpan(0, _count));
        HashCode code = default;
        code.AddBytes(list);
        int hash = code.ToHashCode();
        _flushes++;
        if (!_known.TryGetValue(hash, out Recorded? recorded))
        {
            if (_known.Count == MostGraphs)
                Forget();
            _known[hash] = new Recorded { List = list.ToArray(), LastFlush = _flushes };
            Run();
        }
        else if (!list.SequenceEqual(recorded.List))
        {
            Run(); // another list with the same hash
        }
        else
        {
            recorded.LastFlush = _flushes;
            (recorded.Graph ??= Record()).Launch(_device.Stream);
            GraphLaunches++;
        }

        Empty();
    }

    public void Dispose()
    {
        foreach (Recorded recorded in _known.Values)
            recorded.Graph?.Dispose();
    }

    private void Empty()
    {
        _list.AsSpan(0, _count).Clear(); // what is not written again must not be left from before: lists are compared byte by byte
        _count = 0;
    }

    private ref Command Next()
    {
        if (_count == _list.Length)
            Array.Resize(ref _list, 2 * _count);
        return ref _list[_count++];
    }

    private void Run()
    {
        foreach (ref readonly Command command in _list.AsSpan(0, _count))
        {
            ReadOnlySpan<Argument> a = ((ReadOnlySpan<Argument>)command.Arguments)[..command.Count];
            if (command.Function != 0)
                _kernels.Launch(command.Function, _device.Stream, command.Grid, command.Threads, command.SharedBytes, a);
            else
                _matMul.Multiply(a[0].Pointer, a[1].Pointer, a[2].Pointer, a[3].Pointer, a[4].Int, a[5].Int, a[6].Int, (MatMulOutput)a[7].Int);
        }
    }

    private CudaGraph Record()
    {
        CudaGraph.BeginCapture(_device.Stream);
        try
        {
            Run();
        }
        catch
        {
            using CudaGraph ended = _device.EndCapture(); // the stream is not left capturing
            throw;
        }

        return _device.EndCapture();
    }

    private void Forget()
    {
        (int oldest, Recorded recorded) = _known.MinBy(entry => entry.Value.LastFlush);
        recorded.Graph?.Dispose();
        _known.Remove(oldest);
    }

    private sealed class Recorded
    {
        public required byte[] List { get; init; }

        public CudaGraph? Graph { get; set; }

        public long LastFlush { get; set; }
    }

    /// <summary>A kernel's launch; without a function a matmul.</summary>
    private struct Command
    {
        public nint Function;
        public Grid Grid;
        public int Threads;
        public int SharedBytes;
        public int Count;
        public ArgumentArray Arguments;
    }

    [InlineArray(Most)]
    private struct ArgumentArray
    {
        public const int Most = 24;

        private Argument _first;
    }
}
