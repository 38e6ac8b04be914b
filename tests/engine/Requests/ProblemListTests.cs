using CsCheck;
using Xunit;

namespace Rollout.Engine.Tests;

public sealed class ProblemListTests
{
    [Fact]
    public void The_first_are_kept_and_all_are_counted_however_they_come()
    {
        Gen.Int[0, 15].Array[0, 9].Sample(sizes =>
        {
            ProblemList list = [];
            List<Problem> all = [];
            for (int i = 0; i < sizes.Length; i++)
            {
                Problem[] some = [.. Enumerable.Range(0, sizes[i]).Select(k => new Problem($"F[{i}]", $"problem {k}"))];
                all.AddRange(some);
                if (i % 3 == 0) list.AddRange(some);
                else if (i % 3 == 1) list.AddRange(new ProblemList(some));
                else foreach (Problem problem in some) list.Add(problem);
            }

            Assert.Equal((all.Count, all.Count >= ProblemList.Most), (list.Found, list.IsFull));
            Assert.Equal(all.Take(ProblemList.Most), list.Take(ProblemList.Most));
            Assert.Equal(list.Select(problem => problem), Enumerable.Range(0, list.Count).Select(i => list[i]));
            int more = all.Count - ProblemList.Most;
            Assert.Equal(more > 0 ? [$"and {more} more"] : [], list.Skip(ProblemList.Most).Select(problem => problem.ToString()));
            ProblemList renamed = list.Rename(name => name.ToLowerInvariant(), name => name);
            Assert.Equal(list.ToString().Replace('F', 'f'), renamed.ToString());
            Assert.Equal(list.Found, renamed.Found);
        });
    }
}
